//! One `recvmsg(2)` with its descriptors and the sender's credentials.
//!
//! Written out because no library does both. When the limit of open files is reached, the kernel delivers some
//! descriptors and drops the rest (`MSG_CTRUNC`): nix then returns no control message, so the delivered ones leak.
//! rustix declares the sender's process id as non-zero, but the kernel may give 0: reading it is undefined behaviour.
#![expect(unsafe_code, reason = "recvmsg and its control messages")]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use baton_protocol::fd_manifest::MAX_FDS;
use nix::sys::socket::{setsockopt, sockopt};

use crate::peer::Peer;

/// Room for the control messages of [`MAX_FDS`] descriptors and of credentials, in words so that it is aligned.
const CONTROL: usize = (size_of::<libc::cmsghdr>() + MAX_FDS * size_of::<RawFd>()).div_ceil(8)
    + (size_of::<libc::cmsghdr>() + size_of::<libc::ucred>()).div_ceil(8)
    + 1;

/// What one `recvmsg(2)` gave.
#[derive(Debug)]
pub struct Received {
    /// Bytes written to the buffer; 0 at the end.
    pub length: usize,
    /// The descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender of these bytes by the kernel's word, where the socket asks for it (`SO_PASSCRED`).
    pub sender: Option<Peer>,
    /// Some descriptors were cut off.
    pub fds_lost: bool,
    /// Some bytes of a packet were cut off.
    pub bytes_lost: bool,
}

/// Receives what is there, without waiting.
///
/// # Errors
/// What `recvmsg(2)` fails with, `WouldBlock` if nothing is there.
pub fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = [0u64; CONTROL];
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a msghdr is plain data; all zeroes means no name, no data and no control.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header points to a buffer and a control buffer of the lengths that it says, alive and ours.
    let length = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let mut fds = Vec::new();
    let mut sender = None;
    // SAFETY: the kernel has filled the header.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !next.is_null() {
        // SAFETY: it points to a whole control message within the buffer, aligned by the kernel's rules.
        let message = unsafe { ptr::read_unaligned(next) };
        if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: as above.
            let data = unsafe { libc::CMSG_DATA(next) };
            let bytes = message.cmsg_len.saturating_sub(data.addr() - next.addr());
            for at in 0..bytes / size_of::<RawFd>() {
                // SAFETY: within the control message's data.
                let place = unsafe { data.add(at * size_of::<RawFd>()) };
                // SAFETY: the kernel has written a descriptor there.
                let fd = unsafe { ptr::read_unaligned(place.cast::<RawFd>()) };
                // SAFETY: just received, and nobody else has its number.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                // The last close of a TCP socket waits for what it has not sent, for as long as its owner says. Fails
                // for all that is no socket.
                let _ = setsockopt(&fd, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
                fds.push(fd);
            }
        }
        if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_CREDENTIALS {
            // SAFETY: as above.
            let data = unsafe { libc::CMSG_DATA(next) };
            if message.cmsg_len.saturating_sub(data.addr() - next.addr()) >= size_of::<libc::ucred>() {
                // SAFETY: the control message is long enough for what the kernel has written there.
                let credentials = unsafe { ptr::read_unaligned(data.cast::<libc::ucred>()) };
                sender = Some(Peer { pid: credentials.pid, uid: credentials.uid });
            }
        }
        // SAFETY: `next` is a control message of this header.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok(Received {
        length,
        fds,
        sender,
        fds_lost: header.msg_flags & libc::MSG_CTRUNC != 0,
        bytes_lost: header.msg_flags & libc::MSG_TRUNC != 0,
    })
}
