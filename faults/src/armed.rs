//! The build with fault points: parses the requested faults and injects them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, raise};
use nix::sys::stat::Mode;
use thiserror::Error;

use crate::{Batch, Point};

/// The environment variable that lists the faults.
const FAULTS: &str = "BATON_FAULT";
/// The environment variable with the divisor of the timeouts that pass through [`patience`].
const HURRY: &str = "BATON_HURRY";

/// An environment variable is invalid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SpecError {
    /// An entry is not of the form `name:action`.
    #[error("{FAULTS}: {0:?} is not of the form name:action")]
    Form(String),
    /// The fault point does not exist.
    #[error("{FAULTS}: unknown fault point {0:?}")]
    Point(String),
    /// The action does not exist.
    #[error("{FAULTS}: unknown action {0:?}; use kill, stop, fail, nofile, receiving or sending")]
    Action(String),
    /// The fault point cannot return an error.
    #[error("{FAULTS}: fault point {0:?} cannot fail")]
    Fails(&'static str),
    /// The divisor is not a positive number.
    #[error("{HURRY}: {0:?} is not a positive number")]
    Hurry(String),
}

/// The fault that happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The process kills itself.
    Kill,
    /// The process stops until it is continued.
    Stop,
    /// The point returns an error.
    Fail,
    /// The process cannot open further descriptors.
    NoFile,
    /// The thread waits at the point until the process kills itself in the middle of such a batch.
    In(Batch),
}

impl Action {
    const ALL: [(&str, Self); 6] = [
        ("kill", Self::Kill),
        ("stop", Self::Stop),
        ("fail", Self::Fail),
        ("nofile", Self::NoFile),
        ("receiving", Self::In(Batch::Received)),
        ("sending", Self::In(Batch::Sent)),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, action)| *action == self).map_or("", |(name, _)| name)
    }
}

/// The requested faults.
#[derive(Debug)]
struct Orders {
    faults: Mutex<Vec<(Point, Action)>>,
    hurry: u32,
}

/// Whether the process must die in the middle of the next batch of received, and of sent frames.
static DOOMED: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];

static ORDERS: OnceLock<Orders> = OnceLock::new();

/// Reads the environment variables. No fault happens before this is called.
///
/// # Errors
/// Returns an error if a variable is invalid.
pub fn arm() -> Result<(), SpecError> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let orders =
        Orders { faults: Mutex::new(parse(&variable(FAULTS))?), hurry: parse_hurry(&variable(HURRY))? };
    // Fails if the process is already armed, which is harmless.
    let _ = ORDERS.set(orders);
    Ok(())
}

fn parse(text: &str) -> Result<Vec<(Point, Action)>, SpecError> {
    let parse_one = |order: &str| {
        let (name, action) = order.split_once(':').ok_or_else(|| SpecError::Form(order.to_owned()))?;
        let point = Point::ALL.iter().copied().find(|point| point.name() == name);
        let point = point.ok_or_else(|| SpecError::Point(name.to_owned()))?;
        let known = Action::ALL.iter().find(|(name, _)| *name == action);
        let (_, action) = known.ok_or_else(|| SpecError::Action(action.to_owned()))?;
        if *action == Action::Fail && !point.fails() {
            return Err(SpecError::Fails(point.name()));
        }
        Ok((point, *action))
    };
    text.split(',').filter(|order| !order.is_empty()).map(parse_one).collect()
}

fn parse_hurry(text: &str) -> Result<u32, SpecError> {
    match text {
        "" => Ok(1),
        _ => text.parse().ok().filter(|hurry| *hurry > 0).ok_or_else(|| SpecError::Hurry(text.to_owned())),
    }
}

/// Returns the timeout to use instead of `patience`: shorter if `BATON_HURRY` is set.
pub fn patience(patience: Duration) -> Duration {
    ORDERS.get().map_or(patience, |orders| patience / orders.hurry)
}

/// Marks a fault point where no error can be returned.
pub fn pass(point: Point) {
    // `parse` rejects the action `fail` at such a point.
    let _ = self::point(point);
}

/// Marks a fault point where an error can be returned.
///
/// # Errors
/// Returns an error if the action `fail` is requested at this point.
pub fn point(point: Point) -> io::Result<()> {
    let Some(orders) = ORDERS.get() else { return Ok(()) };
    let ordered = {
        let mut faults = orders.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let next = faults.iter().position(|(at, _)| *at == point);
        next.map(|index| faults.remove(index).1)
    };
    let Some(action) = ordered else { return Ok(()) };
    eprintln!("fault point {}: {}", point.name(), action.name());
    match action {
        // raise(3) signals this thread. A signal to the process could let this thread continue for a moment.
        Action::Kill => Ok(raise(Signal::SIGKILL)?),
        Action::Stop => Ok(raise(Signal::SIGSTOP)?),
        Action::Fail => Err(io::Error::other(format!("fault point {}", point.name()))),
        Action::NoFile => Ok(use_up_descriptors()?),
        Action::In(batch) => {
            doomed(batch).store(true, Ordering::Relaxed);
            loop {
                std::thread::park();
            }
        }
    }
}

fn doomed(batch: Batch) -> &'static AtomicBool {
    match batch {
        Batch::Received => &DOOMED[0],
        Batch::Sent => &DOOMED[1],
    }
}

/// Marks that a worker is in the middle of a batch. Kills the process if a fault requests that.
pub fn batch(batch: Batch) {
    if doomed(batch).load(Ordering::Relaxed) {
        // Cannot fail: a process may always signal itself.
        let _ = raise(Signal::SIGKILL);
    }
}

/// Lowers the limit of open files to the lowest free number. Descriptors above it stay open.
fn use_up_descriptors() -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let free = open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = u64::try_from(free.as_raw_fd()).unwrap_or(0);
    drop(free);
    setrlimit(Resource::RLIMIT_NOFILE, limit, hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_parsed_in_order() {
        assert_eq!(parse("").unwrap(), []);
        assert_eq!(
            parse("target-vmm/taken:kill,source-vmm/saved:fail").unwrap(),
            [(Point::TargetVmmTaken, Action::Kill), (Point::SourceVmmSaved, Action::Fail)]
        );
    }

    #[test]
    fn invalid_faults_are_rejected_with_their_names() {
        let refused = |text| parse(text).unwrap_err().to_string();
        assert!(refused("source-vmm/saved").contains("\"source-vmm/saved\" is not of the form name:action"));
        assert!(refused("source-vmm/lost:kill").contains("unknown fault point \"source-vmm/lost\""));
        assert!(refused("source-vmm/saved:explode").contains("unknown action \"explode\""));
        assert!(refused("target-vmm/taken:fail").contains("fault point \"target-vmm/taken\" cannot fail"));
        assert!(parse_hurry("0").is_err() && parse_hurry("x").is_err());
        assert_eq!((parse_hurry(""), parse_hurry("10")), (Ok(1), Ok(10)));
    }
}
