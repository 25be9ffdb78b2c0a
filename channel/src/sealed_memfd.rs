//! Memfds that one process makes and another one uses as well: sealed, so that neither can take the contents from under
//! the other.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// The size is fixed, and no process can add a seal against writing.
const FIXED_SIZE: SealFlag =
    SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW).union(SealFlag::F_SEAL_SEAL);
/// The contents are fixed, too.
const READ_ONLY: SealFlag = FIXED_SIZE.union(SealFlag::F_SEAL_WRITE);

/// Why a received memfd cannot be used. `what` names it.
#[derive(Debug, thiserror::Error)]
pub enum SealedMemfdError {
    /// It is not a memfd, or lacks seals.
    #[error("{what} is not sealed")]
    NotSealed {
        /// Its name.
        what: &'static str,
    },
    /// Its size is not the one agreed on.
    #[error("{what} has {size} bytes instead of {needed}")]
    Size {
        /// Its name.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The size agreed on.
        needed: u64,
    },
    /// Its size cannot be read.
    #[error("cannot use {what}")]
    System {
        /// Its name.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// Creates a memfd of `size` zero bytes. Its size is fixed.
///
/// # Errors
/// The system's.
pub fn create(name: &str, size: u64) -> io::Result<File> {
    let file = create_unsealed(name)?;
    file.set_len(size)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(FIXED_SIZE))?;
    Ok(file)
}

/// Creates a memfd with `contents`, which are fixed.
///
/// # Errors
/// The system's.
pub fn create_read_only(name: &str, contents: &[u8]) -> io::Result<File> {
    let mut file = create_unsealed(name)?;
    file.write_all(contents)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(READ_ONLY))?;
    Ok(file)
}

fn create_unsealed(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?.into())
}

/// Takes `what` that another process [created](create) with `size` bytes.
///
/// # Errors
/// [`SealedMemfdError`]; the descriptor is closed.
pub fn adopt(file: OwnedFd, what: &'static str, size: u64) -> Result<File, SealedMemfdError> {
    let file = check_seals(file, what, FIXED_SIZE)?;
    let found = file.metadata().map_err(|source| SealedMemfdError::System { what, source })?.len();
    if found == size { Ok(file) } else { Err(SealedMemfdError::Size { what, size: found, needed: size }) }
}

/// Takes `what` that another process [created](create_read_only) with contents of any length.
///
/// # Errors
/// [`SealedMemfdError::NotSealed`]; the descriptor is closed.
pub fn adopt_read_only(file: OwnedFd, what: &'static str) -> Result<File, SealedMemfdError> {
    check_seals(file, what, READ_ONLY)
}

fn check_seals(file: OwnedFd, what: &'static str, needed: SealFlag) -> Result<File, SealedMemfdError> {
    // Fails for a file that cannot have seals.
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
    fn files_of_another_kind_or_size_are_refused() {
        let error = adopted(create("test", 8192).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "the file has 8192 bytes instead of 4096");
        let unsealed = create_unsealed("test").unwrap();
        unsealed.set_len(4096).unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for file in [unsealed.into(), tempfile::tempfile().unwrap().into(), OwnedFd::from(socket)] {
            let error = adopted(file).unwrap_err();
            assert_eq!(error.to_string(), "the file is not sealed");
        }
    }
}
