//! Sealed memfds, which one process creates and shares with another. The seals keep either process from resizing the
//! memory that the other one has mapped.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Fixes the size, and prevents further seals, such as one against writing.
const FIXED_SIZE: SealFlag =
    SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);
/// Fixes the contents as well.
const READ_ONLY: SealFlag = FIXED_SIZE.union(SealFlag::F_SEAL_WRITE);

/// Why a received memfd cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SealedMemfdError {
    /// It is not a memfd, or lacks a seal.
    #[error("{what} is not sealed")]
    NotSealed {
        /// What the memfd holds.
        what: &'static str,
    },
    /// Its size is not the expected one.
    #[error("{what} is {size} bytes long, expected {needed}")]
    Size {
        /// What the memfd holds.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The expected size.
        needed: u64,
    },
    /// Its size cannot be read.
    #[error("cannot read the size of {what}")]
    System {
        /// What the memfd holds.
        what: &'static str,
        /// The error of `fstat(2)`.
        source: io::Error,
    },
}

/// Creates a memfd of `size` zero bytes, whose size cannot change.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn create(name: &str, size: u64) -> io::Result<File> {
    let file = create_unsealed(name)?;
    file.set_len(size)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(FIXED_SIZE))?;
    Ok(file)
}

/// Creates a memfd with `contents`, which cannot change.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn create_read_only(name: &str, contents: &[u8]) -> io::Result<File> {
    let mut file = create_unsealed(name)?;
    file.write_all(contents)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(READ_ONLY))?;
    Ok(file)
}

fn create_unsealed(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?.into())
}

/// Accepts a memfd of `size` bytes that another process [created](create). `what` names its contents in errors.
///
/// # Errors
/// Returns an error if the size is not fixed or not `size`. The descriptor is closed.
pub fn adopt(file: OwnedFd, what: &'static str, size: u64) -> Result<File, SealedMemfdError> {
    let file = check_seals(file, what, FIXED_SIZE)?;
    let found = file.metadata().map_err(|source| SealedMemfdError::System { what, source })?.len();
    if found == size { Ok(file) } else { Err(SealedMemfdError::Size { what, size: found, needed: size }) }
}

/// Accepts a memfd of any length that another process [created](create_read_only). `what` names its contents in
/// errors.
///
/// # Errors
/// Returns [`SealedMemfdError::NotSealed`] if the contents are not fixed. The descriptor is closed.
pub fn adopt_read_only(file: OwnedFd, what: &'static str) -> Result<File, SealedMemfdError> {
    check_seals(file, what, READ_ONLY)
}

fn check_seals(file: OwnedFd, what: &'static str, needed: SealFlag) -> Result<File, SealedMemfdError> {
    // Fails for a file that does not support seals.
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or_default();
    if !SealFlag::from_bits_truncate(seals).contains(needed) {
        return Err(SealedMemfdError::NotSealed { what });
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn adopted(file: impl Into<OwnedFd>) -> Result<File, SealedMemfdError> {
        adopt(file.into(), "the file", 4096)
    }

    #[test]
    fn a_created_memfd_is_adopted_and_shared() {
        let here = create("test", 4096).unwrap();
        let there = adopted(here.try_clone().unwrap()).unwrap();
        here.write_all_at(b"shared", 100).unwrap();
        let mut read = [0; 6];
        there.read_exact_at(&mut read, 100).unwrap();
        assert_eq!(&read, b"shared");
        for file in [here, there] {
            file.set_len(0).unwrap_err();
            file.set_len(8192).unwrap_err();
            let error = fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap_err();
            assert_eq!(error, nix::errno::Errno::EPERM);
        }
    }

    #[test]
    fn a_read_only_memfd_keeps_its_contents() {
        let here = create_read_only("test", b"fixed").unwrap();
        here.write_at(b"x", 0).unwrap_err();
        let there = adopt_read_only(here.into(), "the file").unwrap();
        assert_eq!(there.metadata().unwrap().len(), 5);
        let error = adopt_read_only(create("test", 4096).unwrap().into(), "the file").unwrap_err();
        assert!(matches!(error, SealedMemfdError::NotSealed { .. }), "{error}");
    }

    #[test]
    fn files_of_another_kind_or_size_or_without_seals_are_refused() {
        let error = adopted(create("test", 8192).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "the file is 8192 bytes long, expected 4096");
        let unsealed = create_unsealed("test").unwrap();
        unsealed.set_len(4096).unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for file in [unsealed.into(), tempfile::tempfile().unwrap().into(), OwnedFd::from(socket)] {
            let error = adopted(file).unwrap_err();
            assert_eq!(error.to_string(), "the file is not sealed");
        }
    }
}
