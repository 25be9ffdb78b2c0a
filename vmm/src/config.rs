//! The command line: its options and their validation.
//!
//! This module checks everything that can be checked without touching the host. A usage error ends the program with
//! exit code 2 before it opens anything.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use thiserror::Error;

/// The largest number of queue pairs of a device (vhost-user addresses 256 vrings).
pub const MAX_QUEUE_PAIRS: u16 = 128;

const MIN_MEMORY: u64 = 64 << 20;
const MAX_MEMORY: u64 = 1 << 40;
const PAGE: u64 = 4096;

/// The help of `--net`, with line breaks: clap does not wrap it.
const NET_HELP: &str = "\
Add a network device: socket=PATH[,mac=MAC][,queue-pairs=N][,local-migration=on|off]

Repeatable. The guest sees the devices in the order given.

  socket           the vhost-user socket of the device's back-end
  mac              the guest's MAC address; by default the back-end's, else a random one
  queue-pairs      the number of queue pairs, 1 to 128; by default 1
  local-migration  whether \"batonctl migrate --local\" hands over the TAP; by default on";

/// Exit status and examples, for `--help`.
const AFTER_HELP: &str = "\
Exit status:
  0  The guest powered off or reset, or the VMM ended on SIGTERM or \"batonctl quit\"
  1  Failed; one line on stderr says why
  2  Invalid command line

Examples:
  Boot a guest whose network a baton-backend serves:
    baton-vmm --kernel=vmlinuz --initrd=initrd.img --control-socket=/run/vm1/vmm.ctl \\
        --net socket=/run/vm1/net.sock,mac=02:ba:70:00:00:02

  Receive that VM, whose new back-end listens on net-b.sock:
    baton-vmm --incoming=/run/vm1/vm-b.sock --control-socket=/run/vm1/vmm-b.ctl \\
        --net socket=/run/vm1/net-b.sock,mac=02:ba:70:00:00:02 &
    batonctl /run/vm1/vmm.ctl migrate /run/vm1/vm-b.sock --local";

/// A minimal KVM virtual machine monitor with vhost-user network devices
///
/// Boots a Linux guest whose network devices are vhost-user back-ends, such as baton-backend,
/// or receives a running VM from another baton-vmm on this host.
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-vmm", version, verbatim_doc_comment, after_long_help = AFTER_HELP)]
pub struct Config {
    /// Boot this kernel: a bzImage or an uncompressed ELF vmlinux; required without --incoming
    #[arg(long, value_name = "PATH", required_unless_present = "incoming")]
    pub kernel: Option<PathBuf>,
    /// Load this file as the guest's initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Append these kernel parameters to "console=ttyS0 reboot=k panic=-1"
    ///
    /// If a parameter occurs twice, the last one takes effect.
    #[arg(long, value_name = "STR")]
    pub cmdline: Option<String>,
    /// Number of vCPUs, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub cpus: u8,
    /// Size of guest memory, 64M to 1T, such as 512M or 4G
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: MemorySize,
    /// The network devices, in the order given.
    #[arg(
        long,
        value_name = "DEVICE",
        help = "Add a network device: socket=PATH[,mac=MAC][,queue-pairs=N][,local-migration=on|off]",
        long_help = NET_HELP
    )]
    pub net: Vec<NetConfig>,
    /// Listen for batonctl on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,
    /// Receive a running VM on this Unix socket instead of booting a kernel
    ///
    /// "batonctl migrate" at the VM's current VMM starts the migration. Give the same --cpus,
    /// --memory and --net options as there, except for the sockets. --kernel, --initrd and
    /// --cmdline have no effect.
    #[arg(long, value_name = "PATH", verbatim_doc_comment)]
    pub incoming: Option<PathBuf>,
    /// Keep the received VM paused until "batonctl resume"
    #[arg(long, requires = "incoming")]
    pub paused: bool,
    /// Connect the guest's serial console to stdio, or write its output to file=PATH
    ///
    /// With stdio, a terminal on stdin is set to raw mode: Ctrl-C goes to the guest.
    #[arg(long, value_name = "TARGET", default_value = "stdio")]
    pub serial: SerialTarget,
}

/// Why the program ends before it runs a VM.
#[derive(Debug)]
pub enum EarlyExit {
    /// The text of `--help` or `--version`.
    Information(String),
    /// A usage error, as one line.
    Usage(String),
}

impl Config {
    /// Parses and checks a command line. `arguments` starts with the program's name.
    pub fn from_arguments<I>(arguments: I) -> Result<Self, EarlyExit>
    where
        I: IntoIterator<Item = OsString>,
    {
        let config = Self::try_parse_from(arguments).map_err(|error| {
            if error.use_stderr() {
                EarlyExit::Usage(one_line(&error.to_string()))
            } else {
                EarlyExit::Information(error.to_string())
            }
        })?;
        config.check().map_err(|error| EarlyExit::Usage(error.to_string()))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let mut sockets = HashSet::new();
        let mut macs = HashSet::new();
        for net in &self.net {
            if !sockets.insert(&net.socket) {
                return Err(ConfigError::SameSocket(net.socket.clone()));
            }
            if let Some(mac) = net.mac
                && !macs.insert(mac)
            {
                return Err(ConfigError::SameMac(mac));
            }
        }
        Ok(())
    }
}

/// Returns the first paragraph of clap's message as one line.
fn one_line(message: &str) -> String {
    let paragraph: Vec<&str> = message.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let line = paragraph.join(" ");
    format!("{} (see --help)", line.strip_prefix("error: ").unwrap_or(&line))
}

/// Why an argument is rejected.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not a number with an optional unit.
    #[error("'{0}' is not a size: give a number of bytes, optionally with K, M, G or T, such as 512M")]
    NotASize(String),
    /// Too little, too much, or not whole pages.
    #[error("guest memory must be 64M to 1T, in multiples of 4K")]
    MemoryRange,
    /// Not `stdio` or `file=PATH`.
    #[error("'{0}' is not a serial target: give stdio or file=PATH")]
    NotASerialTarget(String),
    /// Not a unicast MAC address.
    #[error("'{0}' is not a unicast MAC address such as 52:54:00:12:34:56")]
    NotAMac(String),
    /// A device without a socket.
    #[error("a network device needs socket=PATH")]
    NoSocket,
    /// An option without `=`.
    #[error("'{0}' is not an option of the form KEY=VALUE")]
    NotAnOption(String),
    /// An unknown option.
    #[error("unknown option '{0}': use socket, mac, queue-pairs or local-migration")]
    UnknownOption(String),
    /// An option given twice.
    #[error("option '{0}' is given twice")]
    Twice(String),
    /// Not 1 to [`MAX_QUEUE_PAIRS`].
    #[error("queue-pairs must be 1 to {MAX_QUEUE_PAIRS}")]
    QueuePairs,
    /// Neither `on` nor `off`.
    #[error("local-migration must be on or off")]
    LocalMigration,
    /// Two devices with one socket.
    #[error("two network devices use the socket {}: each device needs its own back-end", .0.display())]
    SameSocket(PathBuf),
    /// Two devices with one MAC address.
    #[error("two network devices have the MAC address {0}")]
    SameMac(Mac),
}

/// An amount of guest memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let not_a_size = || ConfigError::NotASize(text.to_owned());
        let (digits, shift) = match text.char_indices().next_back().ok_or_else(not_a_size)? {
            (at, 'k' | 'K') => (&text[..at], 10),
            (at, 'm' | 'M') => (&text[..at], 20),
            (at, 'g' | 'G') => (&text[..at], 30),
            (at, 't' | 'T') => (&text[..at], 40),
            _ => (text, 0),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(not_a_size());
        }
        let number: u64 = digits.parse().map_err(|_| ConfigError::MemoryRange)?;
        let bytes = number.checked_mul(1 << shift).ok_or(ConfigError::MemoryRange)?;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(PAGE) {
            return Err(ConfigError::MemoryRange);
        }
        Ok(Self(bytes))
    }
}

/// Where the serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// Output to stdout, input from stdin.
    Stdio,
    /// Output to this file, no input.
    File(PathBuf),
}

impl FromStr for SerialTarget {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(ConfigError::NotASerialTarget(text.to_owned())),
        }
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Returns a unicast, locally administered address made of `random`.
    pub fn locally_administered(mut random: [u8; 6]) -> Self {
        random[0] = (random[0] & !0x01) | 0x02;
        Self(random)
    }

    /// Returns whether this is a unicast address: neither a group address nor all zeros.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let error = || ConfigError::NotAMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        let mac = Self(bytes);
        if parts.next().is_none() && mac.is_unicast() { Ok(mac) } else { Err(error()) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// One network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The back-end's vhost-user socket.
    pub socket: PathBuf,
    /// The guest's MAC address. `None` stands for the back-end's, or a random one.
    pub mac: Option<Mac>,
    /// The number of queue pairs.
    pub queue_pairs: u16,
    /// Whether a local migration of the VM hands over this device's TAP.
    pub local_migration: bool,
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut seen = HashSet::new();
        let mut socket = None;
        let mut device = Self { socket: PathBuf::new(), mac: None, queue_pairs: 1, local_migration: true };
        for option in text.split(',') {
            let (key, value) =
                option.split_once('=').ok_or_else(|| ConfigError::NotAnOption(option.to_owned()))?;
            if !seen.insert(key) {
                return Err(ConfigError::Twice(key.to_owned()));
            }
            match key {
                "socket" => socket = Some(value).filter(|path| !path.is_empty()),
                "mac" => device.mac = Some(value.parse()?),
                "queue-pairs" => {
                    device.queue_pairs = value
                        .parse()
                        .ok()
                        .filter(|pairs| (1..=MAX_QUEUE_PAIRS).contains(pairs))
                        .ok_or(ConfigError::QueuePairs)?;
                }
                "local-migration" => {
                    device.local_migration = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err(ConfigError::LocalMigration),
                    }
                }
                _ => return Err(ConfigError::UnknownOption(key.to_owned())),
            }
        }
        device.socket = socket.ok_or(ConfigError::NoSocket)?.into();
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, EarlyExit> {
        let program = ["baton-vmm", "--kernel=k"];
        Config::from_arguments(program.iter().chain(arguments).map(OsString::from))
    }

    fn usage(arguments: &[&str]) -> String {
        match parse(arguments) {
            Err(EarlyExit::Usage(line)) => line,
            other => panic!("expected a usage error, got {other:?}"),
        }
    }

    #[test]
    fn kernel_is_the_only_required_option() {
        let config = parse(&[]).unwrap();
        assert_eq!((config.cpus, config.memory), (1, MemorySize(512 << 20)));
        assert_eq!(config.serial, SerialTarget::Stdio);
        assert!(config.net.is_empty());
    }

    #[test]
    fn incoming_vm_needs_no_kernel() {
        let parse = |arguments: &[&str]| {
            Config::from_arguments(["baton-vmm"].iter().chain(arguments).map(OsString::from))
        };
        let config = parse(&["--incoming=/run/vm", "--paused"]).unwrap();
        assert_eq!((config.kernel, config.paused), (None, true));
        // The source's command line works for the target, too.
        let config = parse(&["--kernel=k", "--initrd=i", "--cmdline=c", "--incoming=/run/vm"]).unwrap();
        assert_eq!((config.incoming, config.paused), (Some("/run/vm".into()), false));
        assert!(usage(&["--paused"]).contains("--incoming"));
    }

    #[test]
    fn usage_errors_are_one_line() {
        let no_kernel = Config::from_arguments(["baton-vmm".into()]);
        assert!(
            matches!(no_kernel, Err(EarlyExit::Usage(line)) if line.contains("--kernel") && !line.contains('\n'))
        );
        assert!(usage(&["--cpus=0"]).contains("0"));
        assert!(usage(&["--cpus=17"]).contains("17"));
        assert!(usage(&["--memory=1M"]).contains("64M"));
        assert!(usage(&["--serial=tcp"]).contains("file=PATH"));
        assert!(usage(&["--what"]).contains("--what"));
    }

    #[test]
    fn help_is_not_an_error() {
        assert!(matches!(parse(&["--help"]), Err(EarlyExit::Information(text)) if text.contains("--net")));
    }

    #[test]
    fn memory_sizes_are_parsed_and_checked() {
        assert_eq!("4G".parse(), Ok(MemorySize(4 << 30)));
        assert_eq!("134217728".parse(), Ok(MemorySize(128 << 20)));
        assert_eq!("65536k".parse(), Ok(MemorySize(64 << 20)));
        for wrong in ["", "M", "-1G", "1.5G", "+1G", "1GB", "4 G"] {
            assert_eq!(wrong.parse::<MemorySize>(), Err(ConfigError::NotASize(wrong.to_owned())));
        }
        for out_of_range in ["0", "63M", "2T", "99999999999999999999G", "18014398509481985K", "67108865"] {
            assert_eq!(out_of_range.parse::<MemorySize>(), Err(ConfigError::MemoryRange), "{out_of_range}");
        }
    }

    #[test]
    fn net_device_accepts_every_option() {
        let device: NetConfig =
            "socket=/run/a=b,mac=52:54:00:12:34:ff,queue-pairs=4,local-migration=off".parse().unwrap();
        let mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0xff]);
        assert_eq!(
            device,
            NetConfig { socket: "/run/a=b".into(), mac: Some(mac), queue_pairs: 4, local_migration: false }
        );
        assert_eq!(mac.to_string(), "52:54:00:12:34:ff");
    }

    #[test]
    fn invalid_net_device_is_rejected() {
        let error = |text: &str| text.parse::<NetConfig>().unwrap_err();
        assert_eq!(error("mac=52:54:00:12:34:ff"), ConfigError::NoSocket);
        assert_eq!(error("socket="), ConfigError::NoSocket);
        assert_eq!(error("socket=a,"), ConfigError::NotAnOption(String::new()));
        assert_eq!(error("socket=a,socket=b"), ConfigError::Twice("socket".into()));
        assert_eq!(error("socket=a,queues=2"), ConfigError::UnknownOption("queues".into()));
        assert_eq!(error("socket=a,queue-pairs=0"), ConfigError::QueuePairs);
        assert_eq!(error("socket=a,queue-pairs=129"), ConfigError::QueuePairs);
        assert_eq!(error("socket=a,local-migration=yes"), ConfigError::LocalMigration);
        for mac in [
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "52:54:00:12:34:+5",
        ] {
            assert_eq!(error(&format!("socket=a,mac={mac}")), ConfigError::NotAMac(mac.into()));
        }
    }

    #[test]
    fn devices_with_the_same_socket_or_mac_are_rejected() {
        assert!(usage(&["--net=socket=a", "--net=socket=a"]).contains("its own back-end"));
        let same_mac =
            usage(&["--net=socket=a,mac=52:54:00:00:00:01", "--net=socket=b,mac=52:54:00:00:00:01"]);
        assert!(same_mac.contains("52:54:00:00:00:01"));
    }

    #[test]
    fn random_mac_is_unicast_and_locally_administered() {
        assert_eq!(Mac::locally_administered([0xff; 6]).0[0], 0xfe);
        assert_eq!(Mac::locally_administered([0; 6]).0[0], 0x02);
    }
}
