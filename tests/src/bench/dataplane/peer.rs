//! The back-ends to compare, and how to start each.

use std::ffi::OsString;
use std::io::PipeWriter;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::bare::Mode;
use super::scenario::{Scenario, Traffic};
use crate::process::Process;
use crate::programs;

/// A back-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name in tables.
    pub name: String,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// A program and its arguments, which contain the placeholders `{sock}`, `{tap}` and `{pairs}`.
    Command(Vec<String>),
    /// DPDK's testpmd between a vhost-user device and a TAP that it creates.
    Dpdk,
    /// A TAP without virtio.
    Bare { transmit: Mode },
}

/// A running back-end.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub process: Process,
    /// Its socket; `None` without virtio.
    pub socket: Option<PathBuf>,
    /// Its standard input. Some programs end when that is closed.
    _input: Option<PipeWriter>,
    _directory: tempfile::TempDir,
}

impl Peer {
    /// Returns Baton with its default options, and the back-ends to compare it with.
    ///
    /// # Errors
    /// Returns an error if a program was not built.
    pub fn standard() -> Result<Vec<Self>> {
        let program = |name: &str, path: &Path, options: &[&str]| -> Result<Self> {
            let path = path.to_str().context("the program's path is not UTF-8")?;
            let options = options.iter().map(|option| (*option).to_owned());
            let words = [path.to_owned()].into_iter().chain(options).collect();
            Ok(Self { name: name.to_owned(), kind: Kind::Command(words) })
        };
        let options = ["--socket-path={sock}", "--tap={tap}", "--queue-pairs={pairs}"];
        Ok(vec![
            program("Baton", &programs::backend()?, &options)?,
            program("reference (crates)", &programs::reference_backend()?, &options[..2])?,
            Self { name: "DPDK (polls)".to_owned(), kind: Kind::Dpdk },
            Self { name: "bare TAP".to_owned(), kind: Kind::Bare { transmit: Mode::Writev } },
            Self { name: "bare TAP, io_uring".to_owned(), kind: Kind::Bare { transmit: Mode::IoUring } },
        ])
    }

    /// Returns whether it is a TAP without virtio rather than a back-end.
    pub fn is_bare(&self) -> bool {
        matches!(self.kind, Kind::Bare { .. })
    }

    /// Returns whether it can run this scenario.
    pub fn can(&self, scenario: &Scenario) -> bool {
        match &self.kind {
            // Without `{pairs}` it has one.
            Kind::Command(words) => scenario.pairs == 1 || words.iter().any(|word| word.contains("{pairs}")),
            // Its TAP has one queue, and it does not segment large frames.
            Kind::Dpdk => scenario.pairs == 1 && !scenario.is_large() && !scenario.event_idx,
            Kind::Bare { transmit: Mode::IoUring } => {
                scenario.has_bare() && scenario.traffic == Traffic::Transmit
            }
            Kind::Bare { .. } => scenario.has_bare(),
        }
    }

    /// Returns whether it creates the TAP itself.
    pub fn makes_tap(&self) -> bool {
        self.kind == Kind::Dpdk
    }

    /// Starts it on the TAP with this name.
    ///
    /// # Errors
    /// Returns an error if it cannot be started.
    pub fn start(&self, scenario: &Scenario, tap: &str) -> Result<Running> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("vhost-user");
        let path = socket.to_str().context("the socket's path is not UTF-8")?;
        let (reader, input) = std::io::pipe()?;
        let start = |words: &[String]| {
            let (program, arguments) = words.split_first().context("no program")?;
            let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
            Process::start_with_input(Path::new(program), &arguments, &[], Stdio::from(reader))
        };
        let mut process = match &self.kind {
            Kind::Command(words) => {
                let pairs = scenario.pairs.to_string();
                let filled = |word: &String| {
                    word.replace("{sock}", path).replace("{tap}", tap).replace("{pairs}", &pairs)
                };
                start(&words.iter().map(filled).collect::<Vec<_>>())?
            }
            Kind::Dpdk => start(&dpdk(path, tap))?,
            Kind::Bare { transmit } => {
                let mode = match scenario.traffic {
                    Traffic::Transmit => *transmit,
                    Traffic::Receive => Mode::Readv,
                    other => bail!("{other:?} needs virtio"),
                };
                let mode = match mode {
                    Mode::Writev => "writev",
                    Mode::IoUring => "io-uring",
                    Mode::Readv => "readv",
                };
                let mut words = vec![
                    programs::bench_dataplane()?
                        .to_str()
                        .context("the program's path is not UTF-8")?
                        .to_owned(),
                    "bare".to_owned(),
                    format!("--tap={tap}"),
                    format!("--mode={mode}"),
                    format!("--frame={}", scenario.frame),
                ];
                words.extend(scenario.is_large().then(|| "--offloads".to_owned()));
                start(&words)?
            }
        };
        let socket = if self.is_bare() {
            None
        } else {
            process.wait_until("it listened", |_| Ok(socket.exists().then_some(())))?;
            Some(socket)
        };
        Ok(Running { process, socket, _input: Some(input), _directory: directory })
    }
}

fn dpdk(socket: &str, tap: &str) -> Vec<String> {
    // A prefix for each process, so that several can run at once.
    let prefix = format!("--file-prefix=baton-bench-{}", std::process::id());
    let vhost = format!("--vdev=net_vhost0,iface={socket},queues=1");
    let tap = format!("--vdev=net_tap0,iface={tap}");
    let words = ["dpdk-testpmd", "--lcores=0@0,1@0", "--no-pci", "--no-telemetry", "--no-huge", "-m", "256"];
    let options =
        ["--", "--auto-start", "--nb-cores=1", "--total-num-mbufs=8192", "--rxd=1024", "--txd=1024"];
    let devices = [prefix.as_str(), &vhost, &tap];
    words.into_iter().chain(devices).chain(options).map(str::to_owned).collect()
}

impl FromStr for Peer {
    type Err = anyhow::Error;

    /// Parses `NAME: PROGRAM ARGUMENT…`. In the arguments `{sock}`, `{tap}` and `{pairs}` are placeholders.
    fn from_str(text: &str) -> Result<Self> {
        let (name, command) = text.split_once(": ").context("expected NAME: PROGRAM ARGUMENT…")?;
        let words: Vec<_> = command.split_whitespace().map(str::to_owned).collect();
        if !words.iter().any(|word| word.contains("{sock}")) {
            bail!("{name}: {{sock}} must be among the arguments");
        }
        Ok(Self { name: name.to_owned(), kind: Kind::Command(words) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_needs_a_name_and_a_socket() {
        let peer: Peer =
            "crosvm: /opt/crosvm device net --socket-path {sock} --tap-name {tap}".parse().unwrap();
        assert_eq!(peer.name, "crosvm");
        "crosvm".parse::<Peer>().unwrap_err();
        assert!("crosvm: device net".parse::<Peer>().unwrap_err().to_string().contains("{sock}"));
    }
}
