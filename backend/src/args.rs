//! The command line, validated as far as possible before anything is opened.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use baton_protocol::handover::wire::device::MAX_QUEUE_PAIRS;
use clap::{ArgGroup, Parser};

use crate::dataplane::polling::PollTime;
use crate::tap::SMALLEST_SNDBUF;

/// Signals, exit status and examples, for `--help`.
const AFTER_HELP: &str = "\
Signals:
  SIGTERM, SIGINT  End the back-end cleanly

Exit status:
  0  Ended on request, or after a hand-over
  1  Failed; one line on stderr says why
  2  Invalid command line

Examples:
  Serve a front-end on a Unix socket:
    baton-backend --socket-path=/run/vm1/net.sock --tap=tap0 --control-socket=/run/vm1/backend.ctl

  Replace that back-end while its guest runs:
    baton-backend --incoming-fds=/run/vm1/next.sock --control-socket=/run/vm1/backend.ctl &
    batonctl /run/vm1/backend.ctl handover /run/vm1/next.sock";

/// A vhost-user network back-end that owns its TAP
///
/// Serves one virtio-net device to one front-end at a time: QEMU, Cloud Hypervisor, DPDK's
/// virtio-user or baton-vmm. Frames move between guest memory and a TAP, either in this process or
/// in the kernel (--vhost). Another baton-backend can take over the running session, or the stopped
/// device (--incoming-fds).
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-backend", version, max_term_width = 100, verbatim_doc_comment, after_long_help = AFTER_HELP)]
#[command(group(ArgGroup::new("front-end").args(["socket_path", "fd"])))]
#[command(group(ArgGroup::new("network").args(["tap", "tap_fds", "incoming_fds"]).required(true).multiple(true)))]
pub struct Args {
    /// Listen for front-ends on this Unix socket
    ///
    /// Serves one front-end at a time and accepts the next one when it leaves. The socket has
    /// mode 0600; the back-end removes it at the end, unless it has handed it over.
    #[arg(long, value_name = "PATH", help_heading = "Front-end", verbatim_doc_comment)]
    pub socket_path: Option<PathBuf>,

    /// Connect to a front-end that listens on --socket-path
    ///
    /// Retries every 100 ms until the front-end listens, and reconnects whenever it leaves.
    #[arg(
        long,
        requires = "socket_path",
        conflicts_with = "fd",
        help_heading = "Front-end",
        verbatim_doc_comment
    )]
    pub client: bool,

    /// Use inherited socket N instead of --socket-path
    ///
    /// The socket is either connected to a front-end or listens for front-ends. If it is
    /// connected, the back-end ends when the front-end leaves.
    #[arg(long, value_name = "N", help_heading = "Front-end", verbatim_doc_comment)]
    pub fd: Option<RawFd>,

    /// Attach to this TAP, or create it
    ///
    /// A TAP that the back-end creates vanishes when its last owner ends. The back-end sets neither
    /// addresses nor the link state. For several queue pairs, an existing TAP must be multi-queue.
    #[arg(
        long,
        value_name = "IFNAME",
        conflicts_with = "tap_fds",
        help_heading = "Network",
        verbatim_doc_comment
    )]
    pub tap: Option<String>,

    /// Use these inherited TAP or macvtap descriptors, one for each queue pair
    ///
    /// Each one must be a different queue, opened with IFF_VNET_HDR and IFF_NO_PI. The back-end
    /// then needs no access to /dev/net/tun.
    #[arg(
        long,
        value_name = "N[,N...]",
        value_delimiter = ',',
        help_heading = "Network",
        verbatim_doc_comment
    )]
    pub tap_fds: Option<Vec<RawFd>>,

    /// Take over from another back-end, which connects to this Unix socket
    ///
    /// The other back-end hands over its session, which brings its front-end along, or its
    /// device, which needs --socket-path or --fd for the next front-end. Either arrives with
    /// its TAP and settings, so --tap, --tap-fds, --sndbuf, --mac, --mtu, --script and
    /// --downscript must be left out.
    #[arg(long, value_name = "PATH", help_heading = "Network", verbatim_doc_comment)]
    pub incoming_fds: Option<PathBuf>,

    /// Number of queue pairs, 1 to 128 [default: 1, or one for each of --tap-fds]
    ///
    /// With --incoming-fds, the default is the other back-end's number.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    #[arg(help_heading = "Dataplane", verbatim_doc_comment)]
    pub queue_pairs: Option<u16>,

    /// Let the kernel move the frames, through /dev/vhost-net
    ///
    /// Opens /dev/vhost-net once for each queue pair. If that fails, the back-end ends; it never
    /// falls back to moving the frames itself. With --incoming-fds, a back-end without permission
    /// to open /dev/vhost-net receives the open descriptors with the session.
    #[arg(long, help_heading = "Dataplane", verbatim_doc_comment)]
    pub vhost: bool,

    /// Like --vhost, with these inherited /dev/vhost-net descriptors, one for each queue pair
    #[arg(long, value_name = "N[,N...]", value_delimiter = ',', help_heading = "Dataplane")]
    pub vhost_fds: Option<Vec<RawFd>>,

    /// Poll for work for up to N microseconds before sleeping
    ///
    /// With "auto", a worker polls while that costs less processor time than it saves: it measures
    /// what a sleep costs, and polls for at most as long. 0 means never. With --vhost the kernel
    /// polls for a fixed time, and auto means 0. The default is auto; with --incoming-fds, it is
    /// the other back-end's value.
    #[arg(long, value_name = "auto|N", help_heading = "Dataplane", verbatim_doc_comment)]
    pub poll_us: Option<PollTime>,

    /// Whether workers write many frames at once with io_uring
    ///
    /// auto: if the kernel allows it (Linux 6.1 and later, see io_uring_disabled in /proc/sys/kernel)
    /// and the TAP's send buffer is unlimited. off: one system call for each frame.
    #[arg(long, value_name = "auto|off", default_value = "auto", hide_possible_values = true)]
    #[arg(help_heading = "Dataplane", verbatim_doc_comment)]
    pub io_uring: IoUring,

    /// Size of the TAP's send buffer in bytes; 0 for no limit
    ///
    /// Limits how much the guest can have queued for the network. 1 to 5 bytes are invalid: the
    /// kernel would never report free space in such a buffer.
    #[arg(long, value_name = "BYTES", value_parser = sndbuf, help_heading = "Dataplane", verbatim_doc_comment)]
    pub sndbuf: Option<u32>,

    /// The guest's MAC address, for front-ends that ask the back-end for it
    ///
    /// QEMU does not ask: it has its own setting.
    #[arg(long, value_name = "MAC", help_heading = "Guest", verbatim_doc_comment)]
    pub mac: Option<MacAddress>,

    /// The guest's MTU, for front-ends that ask the back-end for it
    ///
    /// QEMU does not ask: it has its own setting. The TAP should have the same MTU.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(68..))]
    #[arg(help_heading = "Guest", verbatim_doc_comment)]
    pub mtu: Option<u16>,

    /// Run this program once the TAP is open
    ///
    /// Its argument is the TAP's name. If it fails, the back-end ends.
    #[arg(
        long,
        value_name = "PATH|no",
        default_value = "no",
        help_heading = "Scripts",
        verbatim_doc_comment
    )]
    pub script: Script,

    /// Run this program at the end, unless the TAP has been handed over
    ///
    /// Its argument is the TAP's name. A hand-over takes the setting along: the last owner of the
    /// TAP runs the program.
    #[arg(
        long,
        value_name = "PATH|no",
        default_value = "no",
        help_heading = "Scripts",
        verbatim_doc_comment
    )]
    pub downscript: Script,

    /// What a front-end may transfer with SET_DEVICE_STATE_FD
    ///
    /// [default: on if the front-end runs as the same user or as root, otherwise pipe]
    #[arg(long, value_name = "on|pipe|off", help_heading = "Management", verbatim_doc_comment)]
    pub device_state: Option<DeviceState>,

    /// Listen for batonctl on this Unix socket
    ///
    /// With --incoming-fds, the path may be the other back-end's: this back-end takes the socket
    /// over together with the session or device.
    #[arg(long, value_name = "PATH", help_heading = "Management", verbatim_doc_comment)]
    pub control_socket: Option<PathBuf>,

    /// Log messages up to this level on stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = "Management")]
    #[arg(value_parser = ["error", "warn", "info", "debug", "trace"])]
    pub log_level: String,

    /// Print the program's capabilities as JSON and exit
    ///
    /// Follows QEMU's "Backend program conventions". Ignores all other options.
    #[arg(long, verbatim_doc_comment)]
    pub print_capabilities: bool,
}

/// What a front-end may transfer with `SET_DEVICE_STATE_FD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceState {
    /// The device state, with or without the TAP.
    On,
    /// The device state without the TAP.
    Pipe,
    /// Nothing: the protocol feature DEVICE_STATE is not offered.
    Off,
}

/// Whether workers use io_uring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum IoUring {
    /// If the kernel allows it.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Serve front-ends.
    Serve(Box<Args>),
    /// Print the capabilities and exit.
    PrintCapabilities,
}

/// Parses and validates a command line, which starts with the program's name.
///
/// # Errors
/// Returns an error if the command line is invalid. `--help` and `--version` are errors, too, as clap reports them.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // Management software does not know which other options are required.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    let args = Args::try_parse_from(arguments)?;
    check_front_end(&args)
        .map_err(|message| clap::Error::raw(clap::error::ErrorKind::MissingRequiredArgument, message))?;
    check_incoming(&args)
        .map_err(|message| clap::Error::raw(clap::error::ErrorKind::ArgumentConflict, message))?;
    check_descriptors(&args)
        .map_err(|message| clap::Error::raw(clap::error::ErrorKind::WrongNumberOfValues, message))?;
    Ok(Command::Serve(Box::new(args)))
}

/// Checks that there is an endpoint. A session that is handed over brings its own.
fn check_front_end(args: &Args) -> Result<(), String> {
    if args.socket_path.is_none() && args.fd.is_none() && args.incoming_fds.is_none() {
        return Err("no front-end endpoint given: use --socket-path or --fd".to_owned());
    }
    Ok(())
}

/// Checks that `--incoming-fds` comes without the options that the source decides.
fn check_incoming(args: &Args) -> Result<(), String> {
    if args.incoming_fds.is_none() {
        return Ok(());
    }
    let given = [
        ("--tap", args.tap.is_some()),
        ("--tap-fds", args.tap_fds.is_some()),
        ("--sndbuf", args.sndbuf.is_some()),
        ("--mac", args.mac.is_some()),
        ("--mtu", args.mtu.is_some()),
        ("--script", args.script.0.is_some()),
        ("--downscript", args.downscript.0.is_some()),
    ];
    let offenders: Vec<_> = given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect();
    if offenders.is_empty() {
        return Ok(());
    }
    Err(format!("--incoming-fds receives the device with its settings: remove {}", offenders.join(", ")))
}

/// Checks that each queue pair has one descriptor of either kind, and that no descriptor is named twice.
fn check_descriptors(args: &Args) -> Result<(), String> {
    if let Some(fds) = &args.tap_fds {
        if let Some(pairs) = args.queue_pairs
            && fds.len() != usize::from(pairs)
        {
            return Err(format!("--tap-fds has {} descriptors for --queue-pairs={pairs}", fds.len()));
        }
        if fds.len() > 128 {
            return Err("--tap-fds has more than 128 descriptors".to_owned());
        }
    }
    // Without --queue-pairs, the number is checked when the source describes its device.
    let pairs_known = args.incoming_fds.is_none() || args.queue_pairs.is_some();
    if let Some(fds) = &args.vhost_fds
        && pairs_known
        && fds.len() != args.pairs()
    {
        return Err(format!("--vhost-fds has {} descriptors for {} queue pairs", fds.len(), args.pairs()));
    }
    let named = [
        ("--fd", args.fd.as_slice()),
        ("--tap-fds", args.tap_fds.as_deref().unwrap_or_default()),
        ("--vhost-fds", args.vhost_fds.as_deref().unwrap_or_default()),
    ];
    for (position, (one, fds)) in named.iter().enumerate() {
        for (other, others) in &named[position + 1..] {
            if fds.iter().any(|fd| others.contains(fd)) {
                return Err(format!("{one} and {other} name the same descriptor; give each its own"));
            }
        }
    }
    Ok(())
}

impl Args {
    /// Returns the number of queue pairs, or the largest possible number if the source decides it.
    pub fn pairs(&self) -> usize {
        match (&self.tap_fds, self.queue_pairs, &self.vhost_fds) {
            (Some(fds), ..) => fds.len(),
            (None, Some(pairs), _) => usize::from(pairs),
            (None, None, Some(fds)) if self.incoming_fds.is_some() => fds.len(),
            (None, None, _) if self.incoming_fds.is_some() => MAX_QUEUE_PAIRS,
            (None, None, _) => 1,
        }
    }
}

/// Parses `--sndbuf`: 0, or a size at which the kernel reports free space.
fn sndbuf(word: &str) -> Result<u32, String> {
    match word.parse() {
        Ok(bytes) if bytes == 0 || (SMALLEST_SNDBUF..=0x7fff_ffff).contains(&bytes) => Ok(bytes),
        Ok(_) => Err(format!("use 0 for no limit, or {SMALLEST_SNDBUF} to 2147483647 bytes")),
        Err(error) => Err(error.to_string()),
    }
}

/// A unicast Ethernet address, such as `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

/// Why a string is not a [`MacAddress`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six bytes.
    #[error("expected six hexadecimal bytes, such as 02:00:00:00:00:01")]
    Form,
    /// A multicast address, or all zeroes.
    #[error("expected a unicast address: an even first byte, and not all zeroes")]
    NotUnicast,
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(word: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = word.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(MacError::Form)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(MacError::Form);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError::Form)?;
        }
        if parts.next().is_some() {
            return Err(MacError::Form);
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] { Err(MacError::NotUnicast) } else { Ok(Self(bytes)) }
    }
}

/// A program to run. `no`, as in QEMU, or an empty string means none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script(pub Option<PathBuf>);

impl FromStr for Script {
    type Err = std::convert::Infallible;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Ok(Self(Some(word).filter(|word| !matches!(*word, "" | "no")).map(PathBuf::from)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, clap::Error> {
        parse(std::iter::once("baton-backend").chain(line.split_whitespace()).map(OsString::from))
    }

    fn args(line: &str) -> Args {
        match parsed(line).unwrap() {
            Command::Serve(args) => *args,
            Command::PrintCapabilities => panic!("unexpected --print-capabilities"),
        }
    }

    #[test]
    fn front_end_and_network_are_required() {
        for line in
            ["", "--tap=t0", "--socket-path=s", "--socket-path=s --fd=3 --tap=t0", "--client --fd=3 --tap=t0"]
        {
            assert!(parsed(line).is_err(), "{line}");
        }
        assert_eq!(args("--socket-path=s --tap=t0").tap.unwrap(), "t0");
    }

    #[test]
    fn queue_pairs_range_from_1_to_128() {
        for pairs in ["0", "129", "-1", "x"] {
            assert!(parsed(&format!("--socket-path=s --tap=t0 --queue-pairs={pairs}")).is_err(), "{pairs}");
        }
        assert_eq!(args("--socket-path=s --tap=t0 --queue-pairs=128").queue_pairs, Some(128));
    }

    #[test]
    fn number_of_tap_fds_must_match_queue_pairs() {
        assert_eq!(args("--socket-path=s --tap-fds=5,6").tap_fds.unwrap(), [5, 6]);
        parsed("--socket-path=s --tap-fds=5,6 --queue-pairs=1").unwrap_err();
    }

    #[test]
    fn vhost_fds_must_match_queue_pairs_and_be_distinct() {
        assert_eq!(args("--fd=3 --tap=t0 --queue-pairs=2 --vhost-fds=5,6").pairs(), 2);
        assert_eq!(args("--fd=3 --tap-fds=7,8 --vhost --vhost-fds=5,6").pairs(), 2);
        for line in [
            "--fd=3 --tap=t0 --vhost-fds=5,6",
            "--fd=3 --tap-fds=7,8 --vhost-fds=5",
            "--fd=3 --tap-fds=4 --vhost-fds=4",
            "--fd=3 --tap=t0 --vhost-fds=3",
            "--fd=3 --tap-fds=3",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn incoming_fds_excludes_options_that_the_source_decides() {
        assert_eq!(args("--incoming-fds=p").socket_path, None);
        assert_eq!(args("--fd=3 --incoming-fds=p").pairs(), MAX_QUEUE_PAIRS);
        assert_eq!(args("--fd=3 --incoming-fds=p --queue-pairs=4 --poll-us=5 --vhost").pairs(), 4);
        assert_eq!(args("--fd=3 --incoming-fds=p --vhost-fds=5,6").pairs(), 2);
        args("--fd=3 --incoming-fds=p --script=no --downscript=");
        let all = "--fd=3 --incoming-fds=p --tap=t --sndbuf=6 --mac=02:00:00:00:00:01 --mtu=1500 --script=/a --downscript=/b";
        let error = parsed(all).unwrap_err().to_string();
        for offender in ["--tap,", "--sndbuf,", "--mac,", "--mtu,", "--script,", "--downscript"] {
            assert!(error.contains(offender), "{error}");
        }
        parsed("--fd=3 --incoming-fds=p --tap-fds=4").unwrap_err();
    }

    #[test]
    fn print_capabilities_needs_no_other_option() {
        assert!(matches!(parsed("--print-capabilities --socket-path=s"), Ok(Command::PrintCapabilities)));
    }

    #[test]
    fn no_or_empty_string_means_no_script() {
        assert_eq!(args("--fd=3 --tap=t0 --script= --downscript=no").script, Script(None));
        assert_eq!(args("--fd=3 --tap=t0 --script=/x").script, Script(Some("/x".into())));
    }

    #[test]
    fn mac_addresses_must_be_unicast() {
        assert_eq!("02:00:00:00:00:ff".parse(), Ok(MacAddress([2, 0, 0, 0, 0, 255])));
        assert_eq!("03:00:00:00:00:ff".parse::<MacAddress>(), Err(MacError::NotUnicast));
        assert_eq!("00:00:00:00:00:00".parse::<MacAddress>(), Err(MacError::NotUnicast));
        for word in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "+2:00:00:00:00:00"] {
            assert_eq!(word.parse::<MacAddress>(), Err(MacError::Form), "{word}");
        }
    }
}
