//! Opens a TAP: by name, or from descriptors that the parent process opened.
#![expect(unsafe_code, reason = "TAP ioctls")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use baton_channel::retry::retry_while_in_use;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{
    Tap, TapError, empty_request, flags_word, interface, interface_name, ioctl, is_macvtap, set_name,
};

impl Tap {
    /// Attaches `pairs` queues to TAP `name` in this network namespace and keeps its flags, or creates the TAP. Removes
    /// the filters that its last user left. Retries for a moment while the TAP is in use.
    ///
    /// # Errors
    /// Returns a [`TapError`] if the TAP cannot be opened or configured. A TAP that this call created is removed again.
    pub fn open(name: &str, pairs: u16) -> Result<Self, TapError> {
        let bad = name.is_empty()
            || name.len() >= libc::IFNAMSIZ
            || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0');
        if bad || matches!(name, "." | "..") {
            return Err(TapError::Name(name.to_owned()));
        }
        retry_while_in_use(|| Self::try_open(name, pairs), TapError::is_in_use)
    }

    fn try_open(name: &str, pairs: u16) -> Result<Self, TapError> {
        let held = interface::open_queues(name).is_some_and(|queues| queues > 0);
        let kept = interface::tun_flags(name).unwrap_or_default();
        let (first, multi_queue) = match attach(name, pairs > 1, kept) {
            // Two users would split the flows. The kernel refuses only a second user of a single-queue TAP.
            _ if held => (Err(Errno::EBUSY), true),
            // A multi-queue TAP refuses a single-queue file.
            Err(Errno::EINVAL) if pairs == 1 => (attach(name, true, kept), true),
            other => (other, pairs > 1),
        };
        let failed = |errno| {
            let hint = match errno {
                Errno::EINVAL if pairs > 1 => {
                    ": it exists and is not a multi-queue TAP; create it with \"multi_queue\", or use --queue-pairs=1"
                }
                Errno::EINVAL => ": it exists and is not a TAP",
                Errno::EBUSY => ": another process uses it",
                Errno::EPERM | Errno::EACCES => {
                    ": not permitted; run with CAP_NET_ADMIN or as the TAP's owner"
                }
                Errno::E2BIG | Errno::ENOSPC => ": it has no free queue",
                _ => "",
            };
            TapError::Attach { name: name.to_owned(), hint, source: errno.into() }
        };
        let mut queues = vec![first.map_err(failed)??];
        while queues.len() < usize::from(pairs) {
            queues.push(attach(name, true, kept).map_err(failed)??);
        }
        // Two back-ends may start at the same time.
        if interface::open_queues(name).is_some_and(|open| open > queues.len()) {
            return Err(failed(Errno::EBUSY));
        }
        queues.iter().for_each(drop_filters);
        let mut tap =
            Self::from_queues(name.to_owned(), queues, multi_queue, vec![true; usize::from(pairs)])?;
        tap.filters_are_ours = true;
        Ok(tap)
    }

    /// Uses TAP descriptors that the parent process opened, one per queue pair.
    ///
    /// # Errors
    /// Returns a [`TapError`] that names the descriptor, if one is not a usable queue of a common TAP.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let mut queues: Vec<File> = Vec::new();
        let mut attached = Vec::new();
        let mut multi_queue = false;
        let mut first: Option<String> = None;
        for owned in fds {
            let fd = owned.as_raw_fd();
            let file = without_blocking(owned).ok_or(TapError::NotTap(fd))?;
            if let Some(first) = queues.iter().map(AsRawFd::as_raw_fd).find(|first| is_same_file(*first, fd))
            {
                return Err(TapError::SameQueue { fd, first });
            }
            let mut request = empty_request();
            // SAFETY: TUNGETIFF fills an ifreq; any other file answers ENOTTY or the like.
            unsafe { ioctl::get_iff(fd, &raw mut request) }.map_err(|_| TapError::NotTap(fd))?;
            let name = interface_name(&request);
            // SAFETY: TUNGETIFF sets the flags.
            let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
            if flags & libc::IFF_TAP == 0 {
                return Err(TapError::Tun { fd, name });
            }
            if flags & libc::IFF_VNET_HDR == 0 {
                return Err(TapError::NoVnetHdr { fd, name });
            }
            if flags & libc::IFF_NO_PI == 0 {
                return Err(TapError::PacketInfo { fd, name });
            }
            if let Some(first) = first.as_ref().filter(|first| **first != name) {
                return Err(TapError::Mixed { fd, name, first: first.clone() });
            }
            first = Some(name);
            multi_queue = flags & libc::IFF_MULTI_QUEUE != 0 || is_macvtap(&file);
            attached.push(flags & libc::IFF_DETACH_QUEUE == 0);
            queues.push(file);
        }
        let name = first.ok_or(TapError::NoDescriptor)?;
        let mut tap = Self::from_queues(name, queues, multi_queue, attached)?;
        for pair in 0..tap.pairs() {
            // Pair 0 must be attached, and a macvtap does not report whether a queue is.
            if pair == 0 || tap.queue(pair).is_macvtap() {
                tap.attached[pair] &= !tap.queue(pair).is_macvtap();
                tap.set_attached(pair, true)?;
            }
        }
        Ok(tap)
    }
}

/// Opens a queue of TAP `name`. The outer error is that of an ioctl, the inner one that of opening `/dev/net/tun`.
fn attach(name: &str, multi_queue: bool, kept: libc::c_int) -> Result<Result<File, TapError>, Errno> {
    let file = match OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
    {
        Ok(file) => file,
        Err(error) => return Ok(Err(TapError::Open(error))),
    };
    let mut request = empty_request();
    set_name(&mut request, name);
    let mut known: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES fills an int.
    unsafe { ioctl::get_features(file.as_raw_fd(), &raw mut known) }?;
    // The flags that Baton decides, and IFF_NO_CARRIER, which is a request rather than a property of the TAP.
    let ours =
        libc::IFF_TUN | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE | 0x40;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | (kept & known.cast_signed() & !ours);
    request.ifr_ifru.ifru_flags = flags_word(if multi_queue { flags | libc::IFF_MULTI_QUEUE } else { flags });
    // SAFETY: TUNSETIFF reads an ifreq.
    unsafe { ioctl::set_iff(file.as_raw_fd(), &raw const request) }?;
    Ok(Ok(file))
}

/// Removes the filters and the steering program that the last user of a persistent TAP may have left: they would
/// silently keep frames from the guest. A kernel that does not know an ioctl does not have its feature either.
pub(super) fn drop_filters(queue: &File) {
    let fd = queue.as_raw_fd();
    let everything = [0; 2];
    let nothing: libc::c_int = -1;
    // SAFETY: TUNSETTXFILTER reads a tun_filter, here with no flags and no addresses.
    let _ = unsafe { ioctl::set_tx_filter(fd, &raw const everything) };
    // SAFETY: TUNDETACHFILTER takes no argument.
    let _ = unsafe { ioctl::detach_filter(fd) };
    // SAFETY: TUNSETFILTEREBPF reads an int, the descriptor of a program or −1.
    let _ = unsafe { ioctl::set_filter_program(fd, &raw const nothing) };
    // SAFETY: TUNSETSTEERINGEBPF reads the same.
    let _ = unsafe { ioctl::set_steering(fd, &raw const nothing) };
}

/// Returns whether two descriptors refer to the same open file, or `false` if the kernel does not support `kcmp`.
fn is_same_file(one: RawFd, other: RawFd) -> bool {
    let pid = nix::unistd::getpid().as_raw();
    // `KCMP_FILE`.
    let kind: libc::c_int = 0;
    // SAFETY: kcmp takes only numbers.
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, kind, one, other) == 0 }
}

/// Makes an inherited descriptor non-blocking. Returns `None` for one that was opened with `O_PATH`.
fn without_blocking(owned: OwnedFd) -> Option<File> {
    let flags = OFlag::from_bits_retain(fcntl(&owned, FcntlArg::F_GETFL).ok()?);
    fcntl(&owned, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).ok()?;
    Some(File::from(owned))
}
