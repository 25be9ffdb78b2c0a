//! Where tests that need the lab are run: decided once, by [`super::PLACE`] or by probing this machine.

use std::env;
use std::path::Path;

use anyhow::Result;

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
    /// What [`super::PLACE`] is in the lab, and where none is needed; else it is the path of the lab's socket.
    pub const HERE: &str = "here";

    /// As the environment says; if it says nothing, here or in a lab of this process's own.
    pub fn find() -> Result<Self> {
        match env::var(super::PLACE) {
            Ok(place) if place == Self::HERE => Ok(Self::Here),
            Ok(socket) => Ok(Self::Lab(Running::at(Path::new(&socket))?)),
            Err(_) if probe::has_all() => Ok(Self::Here),
            Err(_) => Ok(Self::Lab(Running::start(std::process::id())?)),
        }
    }

    /// Probes this machine, starts a lab that `owner` owns if it needs one, and returns what [`super::PLACE`] is to be.
    pub fn prepare(owner: u32) -> Result<String> {
        if probe::has_all() {
            return Ok(Self::HERE.to_owned());
        }
        Ok(Running::start(owner)?.socket().display().to_string())
    }
}
