//! Queries and settings of a network interface: address, carrier, MTU, TAP flags and queues.
#![expect(unsafe_code, reason = "interface ioctls")]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::{empty_request, set_name};

nix::ioctl_readwrite_bad!(get_address, libc::SIOCGIFHWADDR, libc::ifreq);
nix::ioctl_write_ptr_bad!(change_address, libc::SIOCSIFHWADDR, libc::ifreq);
nix::ioctl_readwrite_bad!(get_mtu, libc::SIOCGIFMTU, libc::ifreq);

/// The length of `struct nlmsghdr` and of `struct ifinfomsg` (`linux/netlink.h`, `linux/rtnetlink.h`).
const HEADERS: [usize; 2] = [16, 16];

fn plain_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
}

/// Returns the Ethernet address of interface `name` if `file` is a socket, or of the TAP's interface if it is a TAP.
pub fn address(file: &impl AsRawFd, name: &str) -> nix::Result<[u8; 6]> {
    let mut request = empty_request();
    set_name(&mut request, name);
    // SAFETY: SIOCGIFHWADDR fills an ifreq.
    unsafe { get_address(file.as_raw_fd(), &raw mut request) }?;
    // SAFETY: SIOCGIFHWADDR has filled this field in.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
    Ok(std::array::from_fn(|at| data[at].cast_unsigned()))
}

/// Sets the Ethernet address of the interface that the TAP `file` belongs to.
pub fn set_address(file: &impl AsRawFd, address: [u8; 6]) -> nix::Result<libc::c_int> {
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().zip(address) {
        *to = from.cast_signed();
    }
    let mut request = empty_request();
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    // SAFETY: SIOCSIFHWADDR reads an ifreq.
    unsafe { change_address(file.as_raw_fd(), &raw const request) }
}

/// Returns whether interface `name`, to which the TAP `file` belongs, has carrier. Returns `None` if the interface is
/// in another network namespace.
pub fn carrier(file: &impl AsRawFd, name: &str) -> Option<bool> {
    if address(file, name) != address(&plain_socket().ok()?, name) {
        return None;
    }
    let answer = link_message(if_nametoindex(name).ok()?).ok()?;
    let carrier = attribute(answer.get(HEADERS.iter().sum()..)?, libc::IFLA_CARRIER)?;
    carrier.first().map(|carrier| *carrier != 0)
}

/// Returns the MTU of interface `name`, to which the TAP `file` belongs. Returns `None` if the interface is in another
/// network namespace.
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

/// Returns the flags that TAP `name` was created with. No ioctl reads them without attaching, which replaces them.
///
/// `/sys` may show another network namespace, so its index and address must match the interface's.
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

/// Returns how many queues of the multi-queue TAP `name` are open in any process, including detached ones. Returns
/// `None` for other interfaces, and on kernels before 4.18, which do not report it.
pub fn open_queues(name: &str) -> Option<usize> {
    let index = if_nametoindex(name).ok()?;
    let answer = link_message(index).ok()?;
    let attributes = answer.get(HEADERS.iter().sum()..)?;
    let info = attribute(attributes, libc::IFLA_LINKINFO)?;
    if attribute(info, libc::IFLA_INFO_KIND)?.strip_suffix(b"\0") != Some(b"tun") {
        return None;
    }
    let data = attribute(info, libc::IFLA_INFO_DATA)?;
    let number = |kind| {
        let bytes = attribute(data, kind)?.try_into().ok()?;
        usize::try_from(u32::from_ne_bytes(bytes)).ok()
    };
    // `IFLA_TUN_NUM_QUEUES`, `IFLA_TUN_NUM_DISABLED_QUEUES`: only multi-queue TAPs have them.
    number(8)?.checked_add(number(9)?)
}

/// Sends `RTM_GETLINK` for interface `index` and returns the answer.
fn link_message(index: u32) -> nix::Result<Vec<u8>> {
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    let mut request = Vec::new();
    let length: u32 = 32;
    request.extend_from_slice(&length.to_ne_bytes());
    request.extend_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request.extend_from_slice(&u16::try_from(libc::NLM_F_REQUEST).unwrap_or_default().to_ne_bytes());
    // Sequence number, port, family and type.
    request.extend_from_slice(&[0; 12]);
    request.extend_from_slice(&index.to_ne_bytes());
    // Flags and change mask.
    request.extend_from_slice(&[0; 8]);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = vec![0; 64 << 10];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    if kind == Some(libc::RTM_NEWLINK) { Ok(answer) } else { Err(Errno::EPROTO) }
}

/// Returns the payload of the attribute of type `kind` in `attributes` (`struct nlattr`).
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let header: [u8; 4] = attributes.get(..4)?.try_into().ok()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let content = attributes.get(4..length)?;
        // The upper two bits are flags.
        if u16::from_ne_bytes([header[2], header[3]]) & 0x3fff == kind {
            return Some(content);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_attributes_are_ignored() {
        let good =
            [8u16.to_ne_bytes(), 5u16.to_ne_bytes(), [1, 2], [3, 4], 6u16.to_ne_bytes(), 7u16.to_ne_bytes()];
        let mut bytes = good.concat();
        bytes.extend([9, 9]);
        assert_eq!(attribute(&bytes, 5), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(&bytes, 7), Some(&[9, 9][..]));
        assert_eq!(attribute(&bytes, 8), None);
        assert_eq!(attribute(&bytes[..bytes.len() - 1], 7), None);
        // A length shorter than the header.
        assert_eq!(attribute(&[0, 0, 5, 0], 5), None);
    }
}
