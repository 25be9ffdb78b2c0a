//! What the kernel says of an interface by its name, in this network namespace.
#![expect(unsafe_code, reason = "interface ioctls")]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{empty_request, set_name};

nix::ioctl_readwrite_bad!(get_address, libc::SIOCGIFHWADDR, libc::ifreq);
nix::ioctl_readwrite_bad!(get_mtu, libc::SIOCGIFMTU, libc::ifreq);

fn plain_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

/// The Ethernet address of interface `name`, or of the interface that the TAP `file` belongs to.
fn address(file: &impl AsRawFd, name: &str) -> nix::Result<[u8; 6]> {
    let mut request = empty_request();
    set_name(&mut request, name);
    // SAFETY: SIOCGIFHWADDR fills an ifreq.
    unsafe { get_address(file.as_raw_fd(), &raw mut request) }?;
    // SAFETY: SIOCGIFHWADDR has filled this field in.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
    Ok(std::array::from_fn(|at| data[at].cast_unsigned()))
}

/// The MTU of interface `name`, to which the TAP `file` belongs. `None` if that is in another namespace.
pub fn mtu(file: &impl AsRawFd, name: &str) -> Option<i32> {
    let socket = plain_socket().ok()?;
    if address(file, name) != address(&socket, name) {
        return None;
    }
    let mut request = empty_request();
    set_name(&mut request, name);
    // SAFETY: SIOCGIFMTU fills an ifreq.
    unsafe { get_mtu(socket.as_raw_fd(), &raw mut request) }.ok()?;
    // SAFETY: SIOCGIFMTU has filled this field in.
    Some(unsafe { request.ifr_ifru.ifru_mtu })
}

/// The flags that TAP `name` was made with. No ioctl tells them without attaching to it, which replaces them.
///
/// `/sys` may show another network namespace: what it says counts only of the same interface.
pub fn tun_flags(name: &str) -> Option<libc::c_int> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/class/net/{name}/{file}")).ok();
    let index = if_nametoindex(name).ok()?;
    let address = address(&plain_socket().ok()?, name).ok()?;
    let address = address.map(|byte| format!("{byte:02x}")).join(":");
    if read("ifindex")?.trim().parse() != Ok(index) || read("address")?.trim() != address {
        return None;
    }
    libc::c_int::from_str_radix(read("tun_flags")?.trim().strip_prefix("0x")?, 16).ok()
}
