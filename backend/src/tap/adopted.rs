//! A TAP that another process hands over: its descriptors are checked and kept, and no setting is made. Offloads and
//! header size belong to the device, and `O_NONBLOCK` to the open file, so any change would disturb the current owner.
#![expect(unsafe_code, reason = "asks the kernel about a TAP")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use baton_protocol::handover::wire::device::{DeviceState, QueuePairState};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{Tap, TapQueue, empty_request, interface_name, ioctl, is_macvtap};

/// Why descriptors do not belong to the TAP that the source describes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// Not a TAP that is attached to an interface.
    #[error("descriptor tap/{0} is not a TAP that is attached to an interface")]
    NotTap(usize),
    /// A TAP of another interface.
    #[error("descriptor tap/{pair} belongs to {name}, not to {expected}")]
    Name {
        /// The queue pair.
        pair: usize,
        /// The interface of the descriptor.
        name: String,
        /// The interface that the source names.
        expected: String,
    },
    /// A TUN, or a TAP with other headers.
    #[error("descriptor tap/{0} was not opened as a TAP with IFF_VNET_HDR and IFF_NO_PI")]
    Flags(usize),
    /// Reads would block.
    #[error("descriptor tap/{0} is blocking")]
    Blocking(usize),
    /// The kernel's state differs from the source's description.
    #[error("descriptor tap/{pair}: the source reports {said}, the kernel reports {is}")]
    Differs {
        /// The queue pair.
        pair: usize,
        /// The source's description.
        said: String,
        /// The kernel's state.
        is: String,
    },
}

/// Returns the TAP of `device` with the queues `fds`.
///
/// # Errors
/// Returns an [`AdoptError`] if a descriptor is not as the source describes it. All descriptors are closed then.
pub fn adopt(device: &DeviceState, fds: Vec<OwnedFd>) -> Result<Tap, AdoptError> {
    let mut multi_queue = false;
    for (pair, (fd, state)) in fds.iter().zip(&device.queue_pairs).enumerate() {
        let flags = check(device, pair, fd, state)?;
        multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
    }
    let queues: Vec<_> = fds.into_iter().map(|fd| Arc::new(TapQueue::new(File::from(fd)))).collect();
    multi_queue |= queues.iter().any(|queue| queue.is_macvtap());
    let first = device.queue_pairs.first().copied().unwrap_or_default();
    Ok(Tap {
        name: device.tap.clone(),
        queues,
        attached: device.queue_pairs.iter().map(|pair| pair.enabled).collect(),
        multi_queue,
        ufo: first.has_ufo,
        uso: first.has_uso,
        // Both are set when this process takes the device.
        offloads: None,
        header_size: None,
        filters_are_ours: false,
        shared: None,
    })
}

/// Checks one queue's descriptor, and returns its interface's flags.
fn check(
    device: &DeviceState,
    pair: usize,
    fd: &OwnedFd,
    state: &QueuePairState,
) -> Result<libc::c_int, AdoptError> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF fills an ifreq; any other file answers ENOTTY or the like.
    unsafe { ioctl::get_iff(fd.as_raw_fd(), &raw mut request) }.map_err(|_| AdoptError::NotTap(pair))?;
    let name = interface_name(&request);
    if name != device.tap {
        return Err(AdoptError::Name { pair, name, expected: device.tap.clone() });
    }
    // SAFETY: TUNGETIFF sets the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let needed = libc::IFF_TAP | libc::IFF_VNET_HDR | libc::IFF_NO_PI;
    if flags & needed != needed {
        return Err(AdoptError::Flags(pair));
    }
    let attached = flags & libc::IFF_DETACH_QUEUE == 0;
    // A macvtap does not report whether a queue is attached.
    if attached != state.enabled && !is_macvtap(fd) {
        let word = |attached| if attached { "attached" } else { "detached" }.to_owned();
        return Err(AdoptError::Differs { pair, said: word(state.enabled), is: word(attached) });
    }
    let mut length: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ fills an int.
    let result = unsafe { ioctl::get_vnet_hdr_size(fd.as_raw_fd(), &raw mut length) };
    if result.is_err() || length != libc::c_int::from(state.host_vnet_hdr_len) {
        let header = |length: String| format!("headers of {length} bytes");
        return Err(AdoptError::Differs {
            pair,
            said: header(state.host_vnet_hdr_len.to_string()),
            is: header(length.to_string()),
        });
    }
    let status = fcntl(fd, FcntlArg::F_GETFL).map_err(|_| AdoptError::NotTap(pair))?;
    if !OFlag::from_bits_retain(status).contains(OFlag::O_NONBLOCK) {
        return Err(AdoptError::Blocking(pair));
    }
    Ok(flags)
}
