//! Decides where tests that need the lab run: by [`super::PLACE`], or by probing this machine.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::client::Running;
use super::probe;

/// Where tests that need the lab run.
#[derive(Debug)]
pub enum Place {
    /// In this process: the machine meets all requirements, or is the lab's machine.
    Here,
    /// In this lab.
    Lab(Running),
}

impl Place {
    /// The value of [`super::PLACE`] in the lab, and where no lab is needed. Otherwise, the value is a list of the
    /// labs' sockets, separated like `PATH`.
    pub const HERE: &str = "here";

    /// Returns the place that the environment names. If it names none, probes this machine, and starts a lab for this
    /// process if the machine needs one.
    pub fn find() -> Result<Self> {
        match env::var(super::PLACE) {
            Ok(place) if place == Self::HERE => Ok(Self::Here),
            Ok(sockets) => Ok(Self::Lab(Running::at(&choose(OsStr::new(&sockets), slot())?)?)),
            Err(_) if probe::has_all() => Ok(Self::Here),
            Err(_) => Ok(Self::Lab(Running::start(std::process::id(), 0)?)),
        }
    }

    /// As [`Self::find`], for a test that creates VMs and runs no guest. Prints why this machine is not the place.
    pub fn find_without_guest() -> Result<Self> {
        if env::var(super::PLACE).is_ok_and(|place| place == Self::HERE) {
            return Ok(Self::Here);
        }
        match probe::creates_vms() {
            Ok(()) => Ok(Self::Here),
            Err(error) => {
                eprintln!("runs in the lab, since this machine cannot create VMs: {error:#}");
                Self::find()
            }
        }
    }

    /// Probes this machine, and starts as many labs as it has resources for if it needs them. The labs live as long as
    /// the process `owner`. Returns the value for [`super::PLACE`].
    pub fn prepare(owner: u32) -> Result<String> {
        if probe::has_all() {
            return Ok(Self::HERE.to_owned());
        }
        let labs: Vec<Running> =
            (0..probe::room()).map(|number| Running::start(owner, number)).collect::<Result<_>>()?;
        let sockets = env::join_paths(labs.iter().map(Running::socket)).context("cannot list the labs")?;
        sockets.into_string().ok().context("the path of a lab's socket is not UTF-8")
    }
}

/// Returns the slot of this test among those that run at the same time, as numbered by nextest within a group.
fn slot() -> usize {
    let slot = env::var("NEXTEST_TEST_GROUP_SLOT");
    slot.ok().and_then(|slot| slot.parse().ok()).unwrap_or(0)
}

/// Returns the lab for a slot. Slots share a lab if there are fewer labs: one test then waits for the other.
fn choose(sockets: &OsStr, slot: usize) -> Result<PathBuf> {
    let sockets: Vec<PathBuf> = env::split_paths(sockets).collect();
    sockets.get(slot % sockets.len()).cloned().context("no lab is running")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_share_a_lab_only_if_there_are_fewer_labs() {
        let of = |sockets: &str, slot| choose(OsStr::new(sockets), slot).unwrap();
        assert_eq!([of("/a:/b", 0), of("/a:/b", 1), of("/a:/b", 2)], ["/a", "/b", "/a"].map(PathBuf::from));
        assert_eq!(of("/a", 1), PathBuf::from("/a"));
    }
}
