//! The command line (DESIGN: "Command lines"), checked as far as it can be without touching anything.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use baton_protocol::handover::wire::device::MAX_QUEUE_PAIRS;
use clap::{ArgGroup, Parser};

use crate::tap::SMALLEST_SNDBUF;

/// A vhost-user network back-end that owns its TAP.
///
/// It serves one virtio-net device to one front-end at a time (QEMU, Cloud Hypervisor, DPDK virtio-user, baton-vmm)
/// and moves the frames between the guest's memory and a TAP.
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-backend", version, max_term_width = 100)]
#[command(group(ArgGroup::new("front-end").args(["socket_path", "fd"])))]
#[command(group(ArgGroup::new("network").args(["tap", "tap_fds", "incoming_fds"]).required(true).multiple(true)))]
pub struct Args {
    /// Listen for the front-end on this Unix socket, and again whenever it has left
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Connect to a front-end that listens on --socket-path, and again whenever it has left
    #[arg(long, requires = "socket_path", conflicts_with = "fd")]
    pub client: bool,

    /// Use this inherited socket, connected to a front-end or listening for one
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,

    /// Attach to this TAP, or create it for as long as the back-end runs
    #[arg(long, value_name = "IFNAME", conflicts_with = "tap_fds")]
    pub tap: Option<String>,

    /// Use these inherited TAP descriptors, one for each queue pair
    #[arg(long, value_name = "N[,N...]", value_delimiter = ',')]
    pub tap_fds: Option<Vec<RawFd>>,

    /// Wait on this Unix socket for another back-end that hands over its session with its front-end, or its device
    #[arg(long, value_name = "PATH")]
    pub incoming_fds: Option<PathBuf>,

    /// How many queue pairs the device has [default: 1, or one for each of --tap-fds, or as many as arrive]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    pub queue_pairs: Option<u16>,

    /// Have the kernel move the frames, with a /dev/vhost-net for each queue pair
    #[arg(long)]
    pub vhost: bool,

    /// The same with these inherited descriptors of /dev/vhost-net, one for each queue pair
    #[arg(long, value_name = "N[,N...]", value_delimiter = ',')]
    pub vhost_fds: Option<Vec<RawFd>>,

    /// Look for work for so many microseconds before waiting for it [default: 0, or as the source of --incoming-fds does]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub poll_us: Option<u32>,

    /// Limit how many bytes may be on their way into the network; 0 is no limit
    #[arg(long, value_name = "BYTES", value_parser = sndbuf)]
    pub sndbuf: Option<u32>,

    /// The guest's MAC address
    #[arg(long, value_name = "MAC")]
    pub mac: Option<MacAddress>,

    /// The guest's MTU
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,

    /// Run this program with the TAP's name once it is open
    #[arg(long, value_name = "PATH|no", default_value = "no")]
    pub script: Script,

    /// Run this program with the TAP's name at the end, if it has not been handed over
    #[arg(long, value_name = "PATH|no", default_value = "no")]
    pub downscript: Script,

    /// What a front-end may do by device state: move the TAP (on), move the state alone (pipe), or nothing (off) [default:
    /// on for a front-end of the same user or root, else pipe]
    #[arg(long, value_name = "on|pipe|off")]
    pub device_state: Option<DeviceState>,

    /// Take commands from batonctl on this Unix socket; with --incoming-fds it may be the source's
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// How much to log on stderr
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    #[arg(value_parser = ["error", "warn", "info", "debug", "trace"])]
    pub log_level: String,

    /// Print what this program can do, as JSON, and exit (QEMU: "Backend program conventions")
    #[arg(long)]
    pub print_capabilities: bool,
}

/// What a front-end may do by device state (`SET_DEVICE_STATE_FD`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceState {
    /// Move it with the TAP, or alone.
    On,
    /// Move it without the TAP.
    Pipe,
    /// Nothing: the protocol feature is not offered.
    Off,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Serve.
    Serve(Box<Args>),
    /// Print the capabilities and exit.
    PrintCapabilities,
}

/// Reads a command line.
///
/// # Errors
/// clap's error, also for `--help` and `--version`.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // Management asks without knowing which other options would be needed; they are ignored.
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

/// Only a session that arrives brings its front-end along.
fn check_front_end(args: &Args) -> Result<(), String> {
    if args.socket_path.is_none() && args.fd.is_none() && args.incoming_fds.is_none() {
        return Err("no front-end can come: use --socket-path or --fd".to_owned());
    }
    Ok(())
}

/// What arrives decides about the TAP and the guest's side of it.
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
    Err(format!("with --incoming-fds the device arrives as it is: leave out {}", offenders.join(", ")))
}

/// Each queue pair has one descriptor of either kind, and each descriptor one use.
fn check_descriptors(args: &Args) -> Result<(), String> {
    if let Some(fds) = &args.tap_fds {
        if let Some(pairs) = args.queue_pairs
            && fds.len() != usize::from(pairs)
        {
            return Err(format!("--tap-fds gives {} descriptors for --queue-pairs={pairs}", fds.len()));
        }
        if fds.len() > 128 {
            return Err("--tap-fds gives more than 128 descriptors".to_owned());
        }
    }
    // Without --queue-pairs, what arrives is checked against them.
    let pairs_known = args.incoming_fds.is_none() || args.queue_pairs.is_some();
    if let Some(fds) = &args.vhost_fds
        && pairs_known
        && fds.len() != args.pairs()
    {
        return Err(format!("--vhost-fds gives {} descriptors for {} queue pairs", fds.len(), args.pairs()));
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
    /// How many queue pairs the device has; how many it can have where that is for the source to say.
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

/// A send buffer that the kernel tells of room in, or none.
fn sndbuf(word: &str) -> Result<u32, String> {
    match word.parse() {
        Ok(bytes) if bytes == 0 || (SMALLEST_SNDBUF..=0x7fff_ffff).contains(&bytes) => Ok(bytes),
        Ok(_) => Err(format!("use 0 for no limit, or {SMALLEST_SNDBUF} to 2147483647 bytes")),
        Err(error) => Err(error.to_string()),
    }
}

/// A unicast Ethernet address, `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

/// Why a word is no [`MacAddress`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six bytes.
    #[error("use six bytes in hexadecimal, as in 02:00:00:00:00:01")]
    Form,
    /// Of a group, or all zeroes.
    #[error("a network device needs a unicast address: the first byte even, and not all zeroes")]
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

/// A program to run, or none: `no`, as with QEMU, or nothing.
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
            Command::PrintCapabilities => panic!("not asked for"),
        }
    }

    #[test]
    fn a_front_end_and_a_network_are_needed() {
        for line in
            ["", "--tap=t0", "--socket-path=s", "--socket-path=s --fd=3 --tap=t0", "--client --fd=3 --tap=t0"]
        {
            assert!(parsed(line).is_err(), "{line}");
        }
        assert_eq!(args("--socket-path=s --tap=t0").tap.unwrap(), "t0");
    }

    #[test]
    fn queue_pairs_are_1_to_128() {
        for pairs in ["0", "129", "-1", "x"] {
            assert!(parsed(&format!("--socket-path=s --tap=t0 --queue-pairs={pairs}")).is_err(), "{pairs}");
        }
        assert_eq!(args("--socket-path=s --tap=t0 --queue-pairs=128").queue_pairs, Some(128));
    }

    #[test]
    fn descriptors_and_queue_pairs_agree() {
        assert_eq!(args("--socket-path=s --tap-fds=5,6").tap_fds.unwrap(), [5, 6]);
        parsed("--socket-path=s --tap-fds=5,6 --queue-pairs=1").unwrap_err();
    }

    #[test]
    fn each_queue_pair_has_one_vhost_net() {
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
    fn what_arrives_excludes_what_would_be_opened_or_set() {
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
    fn capabilities_need_nothing_else() {
        assert!(matches!(parsed("--print-capabilities --socket-path=s"), Ok(Command::PrintCapabilities)));
    }

    #[test]
    fn no_and_nothing_are_no_script() {
        assert_eq!(args("--fd=3 --tap=t0 --script= --downscript=no").script, Script(None));
        assert_eq!(args("--fd=3 --tap=t0 --script=/x").script, Script(Some("/x".into())));
    }

    #[test]
    fn mac_addresses_are_unicast() {
        assert_eq!("02:00:00:00:00:ff".parse(), Ok(MacAddress([2, 0, 0, 0, 0, 255])));
        assert_eq!("03:00:00:00:00:ff".parse::<MacAddress>(), Err(MacError::NotUnicast));
        assert_eq!("00:00:00:00:00:00".parse::<MacAddress>(), Err(MacError::NotUnicast));
        for word in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "+2:00:00:00:00:00"] {
            assert_eq!(word.parse::<MacAddress>(), Err(MacError::Form), "{word}");
        }
    }
}
