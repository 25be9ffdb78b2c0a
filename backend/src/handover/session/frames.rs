//! The frames in hand of a session that is handed over, in a memfd that both ends hold from STAGE on. It has room for
//! one frame of each queue pair, so that no file has to be created or resized during the blackout.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use baton_channel::sealed_memfd::{self, SealedMemfdError};
use baton_protocol::handover::wire::session::FRAME_SLOT;

use crate::dataplane::rx::FrameInHand;
use crate::net_header;

/// The memfd, with one slot for each queue pair.
#[derive(Debug)]
pub struct FrameSlots(File);

impl AsFd for FrameSlots {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl FrameSlots {
    /// Creates slots for `pairs` queue pairs.
    ///
    /// # Errors
    /// Returns an error if the memfd cannot be created.
    pub fn create(pairs: usize) -> io::Result<Self> {
        sealed_memfd::create("baton-frames", slot(pairs)).map(Self)
    }

    /// Adopts the slots that the source created for `pairs` queue pairs.
    ///
    /// # Errors
    /// Returns an error if the descriptor is not a sealed memfd of the right size. The descriptor is closed.
    pub fn adopt(file: OwnedFd, pairs: usize) -> Result<Self, SealedMemfdError> {
        sealed_memfd::adopt(file, "the file of frames", slot(pairs)).map(Self)
    }

    /// Writes a pair's frame into its slot. Returns the frame's length, header included.
    ///
    /// # Errors
    /// Returns an error if the write fails.
    pub fn keep(&self, pair: usize, frame: &FrameInHand) -> io::Result<u32> {
        let FrameInHand { header, frame } = frame;
        self.0.write_all_at(header, slot(pair))?;
        self.0.write_all_at(frame, slot(pair) + header.len() as u64)?;
        u32::try_from(header.len() + frame.len()).map_err(io::Error::other)
    }

    /// Reads the frame that begins with its header at `offset` and has `length` bytes, header included.
    ///
    /// # Errors
    /// Returns an error if the read fails.
    pub fn take(&self, offset: u64, length: u32) -> io::Result<FrameInHand> {
        let mut header = [0; net_header::SHORT];
        let mut frame = vec![0; (length as usize).saturating_sub(header.len())];
        self.0.read_exact_at(&mut header, offset)?;
        self.0.read_exact_at(&mut frame, offset + header.len() as u64)?;
        Ok(FrameInHand { header, frame })
    }
}

/// Returns the offset of a pair's slot.
fn slot(pair: usize) -> u64 {
    pair as u64 * u64::from(FRAME_SLOT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_is_read_as_written() {
        let here = FrameSlots::create(3).unwrap();
        let there = FrameSlots::adopt(here.as_fd().try_clone_to_owned().unwrap(), 3).unwrap();
        let largest = FrameInHand { header: [7; net_header::SHORT], frame: vec![9; crate::tap::MAX_FRAME] };
        let length = here.keep(2, &largest).unwrap();
        assert_eq!(there.take(2 * u64::from(FRAME_SLOT), length).unwrap(), largest);
    }

    #[test]
    fn slots_for_another_number_of_pairs_are_refused() {
        let here = FrameSlots::create(1).unwrap();
        let error = FrameSlots::adopt(here.as_fd().try_clone_to_owned().unwrap(), 2).unwrap_err();
        assert!(matches!(error, SealedMemfdError::Size { .. }), "{error}");
    }
}
