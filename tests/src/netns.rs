//! A network namespace for a test, with TAPs in it.
//!
//! The thread that entered the namespace, the threads and processes that it starts, and the open TAPs keep the
//! namespace alive. When the last of them is gone, however the test ended, the kernel removes the namespace with its
//! interfaces.
#![expect(unsafe_code, reason = "interfaces are configured by ioctl")]

use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::process::FORKING;

/// The network namespace of this thread, which returns to its previous namespace when this is dropped.
#[derive(Debug)]
pub struct Netns {
    before: File,
    /// A namespace belongs to a thread, so this is not `Send`.
    _thread: PhantomData<*const ()>,
}

impl Netns {
    /// Moves this thread into a new, empty network namespace. IPv6 is off, so interfaces send nothing by themselves.
    ///
    /// # Errors
    /// Returns an error if this process lacks the privilege (`CAP_SYS_ADMIN`).
    pub fn enter() -> Result<Self> {
        let before =
            File::open("/proc/thread-self/ns/net").context("cannot open this thread's network namespace")?;
        unshare(CloneFlags::CLONE_NEWNET)
            .context("cannot create a network namespace; run this test as root")?;
        for scope in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
            // A kernel without IPv6 has no such file.
            if std::path::Path::new(&path).exists() {
                std::fs::write(&path, "1").context(path)?;
            }
        }
        Ok(Self { before, _thread: PhantomData })
    }

    /// Replaces `/dev` by a directory with only `null`, for this thread and the processes that it starts. Devices that
    /// are already open stay usable. Other threads still see the real `/dev`.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn hide_devices(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS).context("cannot create a mount namespace")?;
        let null = File::open("/dev/null")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(none, "/dev", Some("tmpfs"), MsFlags::empty(), none)?;
        File::create("/dev/null")?;
        let null = format!("/proc/self/fd/{}", null.as_raw_fd());
        mount(Some(null.as_str()), "/dev/null", none, MsFlags::MS_BIND, none)
            .context("cannot mount /dev/null")?;
        Ok(())
    }

    /// Mounts a `/sys` that shows the interfaces of this namespace, for this thread and the processes that it starts.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn mount_sysfs(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS).context("cannot create a mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(none, "/sys", Some("sysfs"), MsFlags::empty(), none).context("cannot mount /sys")
    }

    /// Creates a TAP with a virtio-net header and `queues` queues, brings it up, and returns its queues. The TAP exists
    /// as long as one of them is open, or if [`set_persistent`] was called.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn create_tap(&self, name: &str, queues: usize) -> Result<Vec<OwnedFd>> {
        let multi_queue = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue;
        let queues = (0..queues).map(|_| open_tun(name, flags)).collect::<Result<Vec<_>>>()?;
        set_up(name)?;
        Ok(queues)
    }

    /// Creates a persistent TAP, brings it up and closes it, so that a back-end can attach to it.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn create_persistent_tap(&self, name: &str, multi_queue: bool) -> Result<()> {
        let multi_queue = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue;
        // A child process that inherits the TAP, until its exec, would keep the back-end from attaching.
        let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let tap = open_tun(name, flags)?;
        set_persistent(&tap)?;
        set_up(name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        setns(&self.before, CloneFlags::CLONE_NEWNET).expect("the previous namespace still exists");
    }
}

/// Returns an `ifreq` for this interface.
fn interface_request(name: &str) -> Result<libc::ifreq> {
    ensure!(name.len() < libc::IFNAMSIZ, "interface name {name} is too long");
    // SAFETY: `ifreq` is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = libc::c_char::from_ne_bytes([source]);
    }
    Ok(request)
}

/// Issues an interface ioctl on a temporary socket in this thread's namespace.
fn interface_ioctl(request: libc::Ioctl, argument: &mut libc::ifreq) -> Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: every request used here takes a pointer to an `ifreq`, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut *argument) };
    Errno::result(result).with_context(|| format!("interface ioctl {request:#x}"))?;
    Ok(())
}

/// Opens a queue of a TUN or TAP interface with exactly these flags. Creates the interface if it does not exist.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn open_tun(name: &str, flags: libc::c_int) -> Result<OwnedFd> {
    let file =
        File::options().read(true).write(true).open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags = i16::from_ne_bytes(flags.to_ne_bytes()[..2].try_into()?);
    // SAFETY: TUNSETIFF takes a pointer to an `ifreq`, which lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(result).with_context(|| format!("TUNSETIFF {name}"))?;
    // SAFETY: `file` has just released ownership of the descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(file.into_raw_fd()) })
}

/// Makes a TAP persistent, so that it still exists after its last queue is closed.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn set_persistent(tap: &OwnedFd) -> Result<()> {
    // SAFETY: TUNSETPERSIST takes only a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    Errno::result(result).context("TUNSETPERSIST")?;
    Ok(())
}

/// Sets the size of a TAP's send buffer, which limits the frames on their way to the network.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn set_sndbuf(tap: &OwnedFd, bytes: libc::c_int) -> Result<()> {
    // SAFETY: TUNSETSNDBUF reads an int.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETSNDBUF, &raw const bytes) };
    Errno::result(result).context("TUNSETSNDBUF")?;
    Ok(())
}

/// The settings of a TAP's queue that a holder of the queue can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    /// Length of the virtio-net header.
    pub header_size: libc::c_int,
    /// Size of the send buffer.
    pub sndbuf: libc::c_int,
    /// Whether the queue is attached, so that the kernel delivers frames to it.
    pub attached: bool,
}

/// Reads the settings of a TAP's queue.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn queue_settings(tap: &OwnedFd) -> Result<QueueSettings> {
    let number = |operation, name| -> Result<libc::c_int> {
        let mut number: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ and TUNGETSNDBUF fill an int.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), operation, &raw mut number) };
        Errno::result(result).context(name)?;
        Ok(number)
    };
    let header_size = number(libc::TUNGETVNETHDRSZ, "TUNGETVNETHDRSZ")?;
    let sndbuf = number(libc::TUNGETSNDBUF, "TUNGETSNDBUF")?;
    let mut request = interface_request("")?;
    // SAFETY: TUNGETIFF fills an ifreq.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    Errno::result(result).context("TUNGETIFF")?;
    // SAFETY: TUNGETIFF sets the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok(QueueSettings { header_size, sndbuf, attached: flags & libc::IFF_DETACH_QUEUE == 0 })
}

/// Changes the header size and send buffer of a TAP's queue, and detaches it.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn spoil_queue(tap: &OwnedFd) -> Result<()> {
    let header_size: libc::c_int = 20;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_size) };
    Errno::result(result).context("TUNSETVNETHDRSZ")?;
    set_sndbuf(tap, 1)?;
    let mut request = interface_request("")?;
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_DETACH_QUEUE)?;
    // SAFETY: TUNSETQUEUE reads an ifreq.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    Errno::result(result).context("TUNSETQUEUE")?;
    Ok(())
}

/// The settings of a TAP, rather than of a queue, that a holder of a queue can change without privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapSettings {
    /// Whether the TAP still exists after its last queue is closed.
    pub persistent: bool,
    /// Its Ethernet address.
    pub address: [u8; 6],
}

/// Reads the settings of a TAP.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn tap_settings(tap: &OwnedFd) -> Result<TapSettings> {
    let mut request = interface_request("")?;
    // SAFETY: TUNGETIFF fills an ifreq.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    Errno::result(result).context("TUNGETIFF")?;
    // SAFETY: TUNGETIFF sets the flags.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    // SAFETY: SIOCGIFHWADDR fills an ifreq.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    Errno::result(result).context("SIOCGIFHWADDR")?;
    // SAFETY: SIOCGIFHWADDR has filled this field in.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
    let persist = 0x0800;
    Ok(TapSettings {
        persistent: flags & persist != 0,
        address: std::array::from_fn(|at| data[at].to_ne_bytes()[0]),
    })
}

/// Changes all settings that [`tap_settings`] reads, and removes the carrier of the TAP.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn spoil_tap(tap: &OwnedFd) -> Result<()> {
    let persistent = libc::c_int::from(!tap_settings(tap)?.persistent);
    // SAFETY: TUNSETPERSIST takes only a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, persistent) };
    Errno::result(result).context("TUNSETPERSIST")?;
    let mut request = interface_request("")?;
    let mut data = [0; 14];
    data[0] = 2;
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
    // SAFETY: SIOCSIFHWADDR reads an ifreq.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::SIOCSIFHWADDR, &raw const request) };
    Errno::result(result).context("SIOCSIFHWADDR")?;
    // `TUNSETCARRIER`, which the `libc` crate does not define.
    let set_carrier = libc::TUNSETPERSIST + 226 - 203;
    let carrier: libc::c_int = 0;
    // SAFETY: TUNSETCARRIER reads an int.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), set_carrier, &raw const carrier) };
    Errno::result(result).context("TUNSETCARRIER")?;
    Ok(())
}

/// Makes a TAP deliver only frames to this address, and attaches a filter program that drops all of these.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn set_filters(tap: &OwnedFd, address: [u8; 6]) -> Result<()> {
    #[repr(C)]
    struct Filter {
        flags: u16,
        count: u16,
        address: [u8; 6],
    }
    let filter = Filter { flags: 0, count: 1, address };
    // SAFETY: TUNSETTXFILTER reads a header, and as many addresses as its count says.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETTXFILTER, &raw const filter) };
    Errno::result(result).context("TUNSETTXFILTER")?;
    // BPF_RET | BPF_K, 0: accepts no byte of any frame.
    let mut nothing = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    // SAFETY: TUNATTACHFILTER reads a program, whose instruction outlives the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNATTACHFILTER, &raw const program) };
    Errno::result(result).context("TUNATTACHFILTER")?;
    Ok(())
}

/// Returns the `IFF_` flags of an interface.
fn flags(name: &str) -> Result<libc::c_short> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has filled this field in.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

/// Returns whether an interface exists in this thread's namespace.
pub fn exists(name: &str) -> bool {
    flags(name).is_ok()
}

/// Brings an interface up.
///
/// # Errors
/// Returns an error if the interface does not exist, or a system call fails.
pub fn set_up(name: &str) -> Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags = flags(name)? | libc::c_short::try_from(libc::IFF_UP)?;
    interface_ioctl(libc::SIOCSIFFLAGS, &mut request).with_context(|| format!("cannot bring {name} up"))
}

/// Returns whether an interface is up.
///
/// # Errors
/// Returns an error if the interface does not exist.
pub fn is_up(name: &str) -> Result<bool> {
    Ok(flags(name)? & libc::c_short::try_from(libc::IFF_UP)? != 0)
}

/// Waits until the kernel has noticed the carrier of an interface, and passes frames to the interface.
///
/// # Errors
/// Returns an error if the interface does not exist, or has no carrier.
pub fn wait_running(name: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(120);
    let running = libc::c_short::try_from(libc::IFF_RUNNING)?;
    while flags(name)? & running == 0 {
        ensure!(Instant::now() < deadline, "{name} has no carrier");
        std::thread::yield_now();
    }
    // The kernel sets the flag before it attaches the queueing discipline, but holds one lock during both. This call
    // takes the same lock.
    set_up(name)
}

/// Sets the MTU of an interface.
///
/// # Errors
/// Returns an error if a system call fails.
pub fn set_mtu(name: &str, mtu: i32) -> Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_mtu = mtu;
    interface_ioctl(libc::SIOCSIFMTU, &mut request).with_context(|| format!("cannot set the MTU of {name}"))
}

/// Returns the index of an interface.
///
/// # Errors
/// Returns an error if the interface does not exist.
pub fn interface_index(name: &str) -> Result<i32> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFINDEX, &mut request)
        .with_context(|| format!("cannot read the index of {name}"))?;
    // SAFETY: SIOCGIFINDEX has filled this field in.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

/// The counters of an interface, from the kernel's point of view: for a TAP, `rx` counts frames written by its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames written by the TAP's owner.
    pub rx_packets: u64,
    /// Frames from the TAP's owner that were dropped.
    pub rx_dropped: u64,
    /// Frames for the TAP's owner.
    pub tx_packets: u64,
    /// Frames for the TAP's owner that were dropped, because the queue was full or absent.
    pub tx_dropped: u64,
}

/// Reads the counters of an interface.
///
/// # Errors
/// Returns an error if the interface does not exist.
pub fn counters(name: &str) -> Result<Counters> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    parse_counters(&text, name).with_context(|| format!("{name} is not in /proc/net/dev"))
}

fn parse_counters(text: &str, name: &str) -> Option<Counters> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = line.split_whitespace().map_while(|number| number.parse().ok()).collect();
    Some(Counters {
        rx_packets: *numbers.get(1)?,
        rx_dropped: *numbers.get(3)?,
        tx_packets: *numbers.get(9)?,
        tx_dropped: *numbers.get(11)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_parsed_by_column() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n \
            lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n\
            tap0: 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115\n";
        let expected = Counters { rx_packets: 101, rx_dropped: 103, tx_packets: 109, tx_dropped: 111 };
        assert_eq!(parse_counters(text, "tap0"), Some(expected));
        assert_eq!(parse_counters(text, "tap"), None);
    }

    #[test]
    fn a_tap_is_removed_with_its_last_queue() {
        let netns = Netns::enter().unwrap();
        let queues = netns.create_tap("tap0", 2).unwrap();
        assert!(is_up("tap0").unwrap());
        drop(queues);
        assert!(!exists("tap0"));
    }

    #[test]
    fn a_persistent_tap_outlives_its_queues() {
        let netns = Netns::enter().unwrap();
        netns.create_persistent_tap("tap0", false).unwrap();
        assert!(is_up("tap0").unwrap());
        assert_eq!(counters("tap0").unwrap(), Counters::default());
    }

    #[test]
    fn dropping_a_namespace_returns_to_the_previous_one() {
        let netns = Netns::enter().unwrap();
        let _queues = netns.create_tap("baton-test0", 1).unwrap();
        drop(netns);
        assert!(!exists("baton-test0"));
    }
}
