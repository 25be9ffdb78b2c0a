//! The descriptors that the parent process opened and the command line names.
//!
//! [`Inherited::claim`] takes all of them before this process opens anything. Later, a number that the operator named
//! by mistake could be that of a file which this process has opened itself.
#![expect(unsafe_code, reason = "takes ownership of descriptors by number")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::args::Args;

/// Why a number on the command line names no inherited descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InheritedError {
    /// Not an open descriptor.
    #[error("{option}: descriptor {fd} is not open")]
    NotOpen {
        /// The option that names it.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
    },
    /// Standard input, output or error.
    #[error("{option}: descriptor {fd} is standard input, output or error; pass one above 2")]
    Standard {
        /// The option that names it.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
    },
    /// Named before.
    #[error("{option}: descriptor {fd} was given twice")]
    Twice {
        /// The option that names it again.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
    },
}

/// The inherited descriptors, by option. All are close-on-exec.
#[derive(Debug)]
pub struct Inherited {
    /// `--fd`.
    pub socket: Option<OwnedFd>,
    /// `--tap-fds`.
    pub tap: Option<Vec<OwnedFd>>,
    /// `--vhost-fds`.
    pub vhost: Option<Vec<OwnedFd>>,
}

impl Inherited {
    /// Takes ownership of all descriptors that the command line names. Call this once, before opening anything.
    ///
    /// # Errors
    /// Returns an [`InheritedError`] if a number names no open descriptor above 2, or is named twice.
    pub fn claim(args: &Args) -> Result<Self, InheritedError> {
        let mut claimed = Vec::new();
        let mut claim = |option, fds: &[RawFd]| -> Result<Vec<OwnedFd>, InheritedError> {
            let claim = |&fd| {
                if claimed.contains(&fd) {
                    return Err(InheritedError::Twice { option, fd });
                }
                let owned = claim(option, fd)?;
                claimed.push(owned.as_raw_fd());
                Ok(owned)
            };
            fds.iter().map(claim).collect()
        };
        Ok(Self {
            socket: claim("--fd", args.fd.as_slice())?.pop(),
            tap: args.tap_fds.as_ref().map(|fds| claim("--tap-fds", fds)).transpose()?,
            vhost: args.vhost_fds.as_ref().map(|fds| claim("--vhost-fds", fds)).transpose()?,
        })
    }
}

/// Takes ownership of descriptor `fd` and makes it close-on-exec. The caller claims each number once.
fn claim(option: &'static str, fd: RawFd) -> Result<OwnedFd, InheritedError> {
    match fd {
        ..0 => return Err(InheritedError::NotOpen { option, fd }),
        0..=2 => return Err(InheritedError::Standard { option, fd }),
        _ => {}
    }
    // SAFETY: the borrow only sets a flag; fcntl(2) fails if the descriptor is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|_| InheritedError::NotOpen { option, fd })?;
    // SAFETY: the operator passed this descriptor to us, it is open, and it is claimed once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
