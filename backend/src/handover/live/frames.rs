//! The frames in hand of a session that is handed over: in a memfd that both ends have from STAGE on, with room for one
//! of each queue pair, so that nothing has to be made and nothing can fail for its size while nobody serves.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use baton_protocol::session::state::FRAME_SLOT;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::dataplane::rx::FrameInHand;
use crate::net_header;

/// What the file must be sealed against: it keeps its size.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);

/// Why there is no room for frames.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    /// The file can change its size.
    #[error("the file of frames is not sealed")]
    NotSealed,
    /// It is not as large as it must be.
    #[error("the file of frames has {size} bytes instead of {needed}")]
    Size {
        /// What it has.
        size: u64,
        /// What it should have.
        needed: u64,
    },
    /// The system would not.
    #[error("cannot use the file of frames")]
    System(#[from] io::Error),
}

/// The file.
#[derive(Debug)]
pub struct Slots(File);

impl AsFd for Slots {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Slots {
    /// Room for a frame of each of so many pairs.
    ///
    /// # Errors
    /// [`SlotsError::System`].
    pub fn create(pairs: usize) -> Result<Self, SlotsError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("baton-frames", flags).map_err(io::Error::from)?);
        file.set_len(slot(pairs))?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)).map_err(io::Error::from)?;
        Ok(Self(file))
    }

    /// The file that the source made for so many pairs.
    ///
    /// # Errors
    /// [`SlotsError`]; the descriptor is closed.
    pub fn adopt(file: OwnedFd, pairs: usize) -> Result<Self, SlotsError> {
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| SlotsError::NotSealed)?;
        if !SealFlag::from_bits_truncate(seals).contains(SEALS) {
            return Err(SlotsError::NotSealed);
        }
        let file = File::from(file);
        let (size, needed) = (file.metadata()?.size(), slot(pairs));
        if size == needed { Ok(Self(file)) } else { Err(SlotsError::Size { size, needed }) }
    }

    /// Keeps a pair's frame; gives its length with its header.
    ///
    /// # Errors
    /// The system's.
    pub fn keep(&self, pair: usize, frame: &FrameInHand) -> io::Result<u32> {
        let FrameInHand { header, frame } = frame;
        self.0.write_all_at(header, slot(pair))?;
        self.0.write_all_at(frame, slot(pair) + header.len() as u64)?;
        u32::try_from(header.len() + frame.len()).map_err(io::Error::other)
    }

    /// A frame that begins there, with its header, and has this length.
    ///
    /// # Errors
    /// The system's.
    pub fn take(&self, offset: u64, length: u32) -> io::Result<FrameInHand> {
        let mut header = [0; net_header::SHORT];
        let mut frame = vec![0; (length as usize).saturating_sub(header.len())];
        self.0.read_exact_at(&mut header, offset)?;
        self.0.read_exact_at(&mut frame, offset + header.len() as u64)?;
        Ok(FrameInHand { header, frame })
    }
}

/// Where a pair's frame begins.
fn slot(pair: usize) -> u64 {
    pair as u64 * u64::from(FRAME_SLOT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_arrives_as_it_was() {
        let here = Slots::create(3).unwrap();
        let there = Slots::adopt(here.as_fd().try_clone_to_owned().unwrap(), 3).unwrap();
        let largest = FrameInHand { header: [7; net_header::SHORT], frame: vec![9; crate::tap::MAX_FRAME] };
        let length = here.keep(2, &largest).unwrap();
        assert_eq!(there.take(2 * u64::from(FRAME_SLOT), length).unwrap(), largest);
    }

    #[test]
    fn a_file_that_is_not_as_it_must_be_is_refused() {
        let here = Slots::create(1).unwrap();
        let error = Slots::adopt(here.as_fd().try_clone_to_owned().unwrap(), 2).unwrap_err();
        assert!(matches!(error, SlotsError::Size { .. }), "{error}");
        let error = Slots::adopt(tempfile::tempfile().unwrap().into(), 1).unwrap_err();
        assert!(matches!(error, SlotsError::NotSealed), "{error}");
    }
}
