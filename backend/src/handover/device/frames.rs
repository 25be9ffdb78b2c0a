//! The frames in hand, in a sealed memfd: frames that the source has read from the TAP and not yet delivered.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use baton_channel::sealed_memfd::{self, SealedMemfdError};
use baton_protocol::handover::device::validate::CheckedDevice;
use baton_protocol::handover::wire::device::FrameExtent;

use crate::dataplane::rx::FrameInHand;
use crate::net_header;

/// Why the frames in hand cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FramesError {
    /// The file is not a sealed memfd.
    #[error(transparent)]
    Memfd(#[from] SealedMemfdError),
    /// A frame goes beyond the end of the file.
    #[error("the file of frames ends before the frame of queue pair {0}")]
    Beyond(usize),
    /// The device state describes frames, but there is no file.
    #[error("the file of frames is missing")]
    Missing,
    /// A system call failed.
    #[error("cannot read the file of frames")]
    System(#[from] io::Error),
}

/// Writes the frames in hand, at most one for each pair. Returns the file, or `None` without frames, and each frame's
/// position.
///
/// # Errors
/// Returns an error if the file cannot be created.
pub fn write(frames: &[Option<FrameInHand>]) -> io::Result<(Option<OwnedFd>, Vec<Option<FrameExtent>>)> {
    if frames.iter().all(Option::is_none) {
        return Ok((None, vec![None; frames.len()]));
    }
    let mut contents = Vec::new();
    let mut extents = Vec::new();
    for frame in frames {
        let Some(FrameInHand { header, frame }) = frame else {
            extents.push(None);
            continue;
        };
        let length = u32::try_from(header.len() + frame.len()).map_err(io::Error::other)?;
        extents.push(Some(FrameExtent { offset: contents.len() as u64, length }));
        contents.extend_from_slice(header);
        contents.extend_from_slice(frame);
    }
    Ok((Some(sealed_memfd::create_read_only("baton-frames", &contents)?.into()), extents))
}

/// Reads the frames that `device` describes, each with its pair.
///
/// # Errors
/// Returns an error if the file is missing, not a sealed memfd or too short, or cannot be read.
pub fn read(device: &CheckedDevice, file: Option<OwnedFd>) -> Result<Vec<(usize, FrameInHand)>, FramesError> {
    let mut frames = Vec::new();
    let Some(file) = file else {
        return if device.frames().next().is_none() { Ok(frames) } else { Err(FramesError::Missing) };
    };
    let file = sealed_memfd::adopt_read_only(file, "the file of frames")?;
    let size = file.metadata()?.size();
    for (pair, FrameExtent { offset, length }) in device.frames() {
        if offset.checked_add(u64::from(length)).is_none_or(|end| end > size) {
            return Err(FramesError::Beyond(pair));
        }
        let mut header = [0; net_header::SHORT];
        let mut frame = vec![0; (length as usize).saturating_sub(header.len())];
        file.read_exact_at(&mut header, offset)?;
        file.read_exact_at(&mut frame, offset + net_header::SHORT as u64)?;
        frames.push((pair, FrameInHand { header, frame }));
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use baton_protocol::handover::device::validate::Capabilities;
    use baton_protocol::handover::wire::device::{DeviceState, QueuePairState};

    use super::*;

    fn checked(extents: &[Option<FrameExtent>]) -> CheckedDevice {
        let pair = |&frame_in_hand: &Option<FrameExtent>| QueuePairState {
            using_vnet_hdr: true,
            host_vnet_hdr_len: 12,
            frame_in_hand,
            ..QueuePairState::default()
        };
        let queue_pairs = extents.iter().map(pair).collect();
        let device = DeviceState { tap: "tap0".to_owned(), queue_pairs, ..DeviceState::default() };
        CheckedDevice::try_from((device, &Capabilities::default())).unwrap()
    }

    fn frame(byte: u8, length: usize) -> FrameInHand {
        FrameInHand { header: [byte; net_header::SHORT], frame: vec![byte; length] }
    }

    #[test]
    fn frames_are_read_as_written() {
        let frames = [None, Some(frame(1, 60)), Some(frame(2, 65_000))];
        let (file, extents) = write(&frames).unwrap();
        let read = read(&checked(&extents), file).unwrap();
        assert_eq!(read, [(1, frame(1, 60)), (2, frame(2, 65_000))]);
    }

    #[test]
    fn no_file_is_written_without_frames() {
        let (file, extents) = write(&[None, None]).unwrap();
        assert!(file.is_none());
        assert!(read(&checked(&extents), file).unwrap().is_empty());
    }

    #[test]
    fn missing_short_or_unsealed_file_is_refused() {
        let (file, extents) = write(&[Some(frame(1, 60))]).unwrap();
        let error = read(&checked(&extents), None).unwrap_err();
        assert!(matches!(error, FramesError::Missing), "{error}");
        let longer = extents[0].map(|extent| FrameExtent { length: 71, ..extent });
        let error = read(&checked(&[longer]), file).unwrap_err();
        assert!(matches!(error, FramesError::Beyond(0)), "{error}");
        let unsealed = tempfile::tempfile().unwrap();
        let error = read(&checked(&extents), Some(unsealed.into())).unwrap_err();
        assert!(matches!(error, FramesError::Memfd(_)), "{error}");
    }
}
