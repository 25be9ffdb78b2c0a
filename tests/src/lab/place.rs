//! Where tests that need the lab are run: decided once, by [`super::PLACE`] or by probing this machine.

use std::env;
use std::ffi::OsStr;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::client::Running;
use super::probe;

/// Where tests that need the lab are run.
#[derive(Debug)]
pub enum Place {
    /// In this very process: the machine has all they need, or is the lab's.
    Here,
    /// In this lab.
    Lab(Running),
}

impl Place {
    /// What [`super::PLACE`] is in the lab, and where none is needed; else it is a list, as `PATH` is, of the sockets of
    /// the labs.
    pub const HERE: &str = "here";

    /// As the environment says; if it says nothing, here or in a lab of this process's own.
    pub fn find() -> Result<Self> {
        match env::var(super::PLACE) {
            Ok(place) if place == Self::HERE => Ok(Self::Here),
            Ok(sockets) => Ok(Self::Lab(Running::at(&choose(OsStr::new(&sockets), slot())?)?)),
            Err(_) if probe::has_all() => Ok(Self::Here),
            Err(_) => Ok(Self::Lab(Running::start(std::process::id(), 0)?)),
        }
    }

    /// Probes this machine, starts as many labs as it has room for if it needs one, and returns what [`super::PLACE`] is
    /// to be. `owner` owns them.
    pub fn prepare(owner: u32) -> Result<String> {
        if probe::has_all() {
            return Ok(Self::HERE.to_owned());
        }
        let labs: Vec<Running> =
            (0..probe::room()).map(|number| Running::start(owner, number)).collect::<Result<_>>()?;
        let sockets = env::join_paths(labs.iter().map(Running::socket)).context("cannot list the labs")?;
        sockets.into_string().ok().context("a path that is not UTF-8")
    }
}

/// Which of the tests that run side by side this one is, as nextest counts within a group.
fn slot() -> usize {
    let slot = env::var("NEXTEST_TEST_GROUP_SLOT");
    slot.ok().and_then(|slot| slot.parse().ok()).unwrap_or(0)
}

/// The lab for that slot. Two get the same where there are fewer labs: the one then waits for the other.
fn choose(sockets: &OsStr, slot: usize) -> Result<PathBuf> {
    let sockets: Vec<PathBuf> = env::split_paths(sockets).collect();
    sockets.get(slot % sockets.len()).cloned().context("there is no lab")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_a_lab_of_its_own_as_long_as_there_are_some() {
        let of = |sockets: &str, slot| choose(OsStr::new(sockets), slot).unwrap();
        assert_eq!([of("/a:/b", 0), of("/a:/b", 1), of("/a:/b", 2)], ["/a", "/b", "/a"].map(PathBuf::from));
        assert_eq!(of("/a", 1), PathBuf::from("/a"));
    }
}
