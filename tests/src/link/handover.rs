//! Hands the session of a running guest from back-end to back-end. Neither the guest nor its front-end may notice.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{Request, SessionReport};

use super::{GUEST, Link, TAP, command_line, option};
use crate::backend::WAITS;
use crate::guest::{Accelerator, Guest};
use crate::migration::{Kind, Load};
use crate::process::{self, Process};
use crate::{backend, datapath, netns, ping, programs, switching};

/// A back-end that waits for the session of a [`Link`]'s back-end.
#[derive(Debug)]
pub struct Successor {
    /// The process.
    pub process: Process,
    incoming: PathBuf,
    arguments: Vec<OsString>,
}

impl Successor {
    /// Returns the socket at which it waits.
    pub fn incoming(&self) -> &Path {
        &self.incoming
    }

    /// Returns its command line, for a person to read.
    pub fn command_line(&self) -> String {
        command_line(&self.arguments)
    }
}

impl Link {
    /// Hands the session over to another back-end, which becomes this link's back-end, at the same control socket.
    ///
    /// # Errors
    /// Returns an error if the hand-over fails, or the old back-end does not end by itself without failure.
    pub fn hand_over(&mut self) -> Result<()> {
        let successor = self.successor()?;
        let path = Some(successor.incoming.display().to_string());
        let request = Request::Handover { path, on_suspend: false, dry_run: false, cancel: false };
        let report: SessionReport = backend::in_time(|| self.ask(&request))?;
        let logs = || format!("source:\n{}target:\n{}", self.backend.log(), successor.process.log());
        ensure!(matches!(report, SessionReport::Completed { .. }), "{report:?}; {}", logs());
        self.succeeded_by(successor)
    }

    /// Starts another back-end, which waits for this one's session.
    ///
    /// # Errors
    /// Returns an error if it cannot be started.
    pub fn successor(&mut self) -> Result<Successor> {
        // The last successor still has its socket.
        self.hand_overs += 1;
        let incoming = self.control.with_file_name(format!("incoming-{}", self.hand_overs));
        let mut arguments = vec![
            option("--incoming-fds=", &incoming),
            option("--control-socket=", &self.control),
            "--log-level=debug".into(),
        ];
        arguments.extend(datapath::options(self.datapath).iter().map(Into::into));
        let mut process = Process::start(&programs::backend()?, &arguments, &[])?;
        process.wait_until("it waited for a session", |process| {
            Ok(process.log().contains(WAITS).then_some(()))
        })?;
        Ok(Successor { process, incoming, arguments })
    }

    /// Makes `successor`, which has the session, this link's back-end.
    ///
    /// # Errors
    /// Returns an error if the old back-end does not end by itself without failure.
    pub fn succeeded_by(&mut self, successor: Successor) -> Result<()> {
        let source = &mut self.backend;
        let status = source.wait()?;
        ensure!(status.success() && !source.log().contains("panicked"), "{status}; {}", source.log());
        self.backend = successor.process;
        self.client = Some(ControlClient::connect(&self.control)?);
        Ok(())
    }

    /// Hands the session over repeatedly while pings, TCP streams and numbered datagrams go both ways. Checks that none
    /// of them is lost, doubled or overtaken, and that neither the guest nor its front-end notices.
    ///
    /// # Errors
    /// Returns an error if one of the checks fails.
    pub fn check_hand_overs(
        &mut self,
        guest: &mut Guest,
        accelerator: Accelerator,
        times: usize,
    ) -> Result<()> {
        // The guest's kernel reports the link as up after a delay.
        guest.check("until grep -q up /sys/class/net/eth0/operstate; do sleep 0.1; done")?;
        self.check_pings(guest, 5)?;
        let before = Appearance::of(guest)?;
        guest.check("dmesg -c >/dev/null")?;
        let (datapath, queue_pairs) = (self.datapath, self.queue_pairs);
        let load = Load::start(Kind { datapath, accelerator, queue_pairs });
        let pings = ping::Endless::start(GUEST);
        for hop in 0..times {
            load.wait_moving().with_context(|| format!("before hand-over {hop}"))?;
            self.hand_over().with_context(|| format!("hand-over {hop}"))?;
        }
        load.wait_moving()?;
        let (sent, lost) = pings.end()?;
        ensure!(lost.is_empty(), "{} of {sent} pings were lost", lost.len());
        let balance = load.end(&[])?;
        ensure!(balance.bytes > 0 && balance.datagrams.iter().all(|count| *count > 0), "{balance:?}");
        guest.check_dmesg()?;
        let after = Appearance::of(guest)?;
        ensure!(after == before, "the guest changed from {before:?} to {after:?}");
        self.check_healthy()
    }

    /// Checks, after hand-overs, that the guest's driver can be bound anew, that every queue pair then works, and that
    /// the session can be handed over.
    ///
    /// # Errors
    /// Returns an error if one of these does not work.
    pub fn check_rebound(&mut self, guest: &mut Guest) -> Result<()> {
        switching::rebind_driver(guest)?;
        switching::check_all_pairs(self, guest)?;
        self.hand_over()?;
        switching::check_all_pairs(self, guest)
    }
}

/// What would change if the guest were without a back-end for a while.
#[derive(Debug, PartialEq, Eq)]
struct Appearance {
    /// The front-end's connections.
    sockets: Vec<String>,
    /// The front-end's log.
    log: String,
    /// How often the guest's link went up or down.
    carrier_changes: String,
    /// How many frames the TAP dropped.
    dropped: u64,
}

impl Appearance {
    fn of(guest: &mut Guest) -> Result<Self> {
        Ok(Self {
            sockets: process::sockets_of(guest.process())?,
            log: guest.log(),
            carrier_changes: guest.check("cat /sys/class/net/eth0/carrier_changes")?,
            dropped: netns::counters(TAP)?.tx_dropped,
        })
    }
}
