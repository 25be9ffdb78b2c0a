//! One `recvmsg(2)` with its descriptors and the sender's credentials.
//!
//! Hand-written because neither nix nor rustix gets both right. At the limit of open files, the kernel delivers some
//! descriptors and drops the rest (`MSG_CTRUNC`): nix then returns no control message and leaks the delivered ones.
//! rustix declares the sender's process id as non-zero, but the kernel may set it to 0, which is undefined behaviour.
#![expect(unsafe_code, reason = "recvmsg and its control messages")]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use baton_protocol::fd_manifest::MAX_FDS;
use nix::sys::socket::{setsockopt, sockopt};

use crate::peer::Peer;

/// Length of the buffer for the control messages of [`MAX_FDS`] descriptors and of credentials, in words for alignment.
const CONTROL: usize = (size_of::<libc::cmsghdr>() + MAX_FDS * size_of::<RawFd>()).div_ceil(8)
    + (size_of::<libc::cmsghdr>() + size_of::<libc::ucred>()).div_ceil(8)
    + 1;

/// The result of one `recvmsg(2)`.
#[derive(Debug)]
pub struct Received {
    /// Bytes written to the buffer; 0 at the end of the stream.
    pub length: usize,
    /// The descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender of these bytes as attested by the kernel, if the socket has `SO_PASSCRED` set.
    pub sender: Option<Peer>,
    /// The kernel dropped some descriptors (`MSG_CTRUNC`).
    pub fds_lost: bool,
    /// The packet is longer than the buffer (`MSG_TRUNC`).
    pub bytes_lost: bool,
}

/// Receives a packet, or the bytes that have arrived on a stream, without blocking.
///
/// # Errors
/// Returns the error of `recvmsg(2)`: `WouldBlock` if nothing has arrived.
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
    // SAFETY: the header points to a live buffer and a live control buffer, of the lengths that it states.
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
                // SAFETY: the descriptor was just received, and nothing else owns it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                // A TCP socket with SO_LINGER could block this process when it is closed. Fails for other files.
                let _ = setsockopt(&fd, sockopt::Linger, &libc::linger { l_onoff: 0, l_linger: 0 });
                fds.push(fd);
            }
        }
        if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_CREDENTIALS {
            // SAFETY: as above.
            let data = unsafe { libc::CMSG_DATA(next) };
            if message.cmsg_len.saturating_sub(data.addr() - next.addr()) >= size_of::<libc::ucred>() {
                // SAFETY: the control message is long enough for the `ucred` that the kernel has written there.
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
