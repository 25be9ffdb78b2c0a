//! The build with fault points: what was ordered, and how it is done.

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

/// The variable that says what is to happen where.
const FAULTS: &str = "BATON_FAULT";
/// The variable that says how much shorter everybody's patience is.
const HURRY: &str = "BATON_HURRY";

/// What is ordered makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SpecError {
    /// Not `name:action`.
    #[error("{FAULTS}: {0:?} is not name:action")]
    Form(String),
    /// No such fault point.
    #[error("{FAULTS}: there is no fault point {0:?}")]
    Point(String),
    /// No such action.
    #[error("{FAULTS}: there is no action {0:?}, only kill, stop, fail, nofile, receiving and sending")]
    Action(String),
    /// Nothing can fail there.
    #[error("{FAULTS}: nothing can fail at {0:?}")]
    Fails(&'static str),
    /// Not a number above 0.
    #[error("{HURRY}: {0:?} is not a number above 0")]
    Hurry(String),
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The process kills itself.
    Kill,
    /// It stops until somebody continues it.
    Stop,
    /// An error is returned.
    Fail,
    /// No descriptor can be had any more.
    NoFile,
    /// Nothing more happens there until the process kills itself in the middle of such a batch.
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

/// What is ordered.
#[derive(Debug)]
struct Orders {
    faults: Mutex<Vec<(Point, Action)>>,
    hurry: u32,
}

/// Whether the process is to die in the middle of a batch of received and of sent frames.
static DOOMED: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];

static ORDERS: OnceLock<Orders> = OnceLock::new();

/// Reads what is ordered. Without that nothing happens anywhere.
///
/// # Errors
/// [`SpecError`].
pub fn arm() -> Result<(), SpecError> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let orders =
        Orders { faults: Mutex::new(parse(&variable(FAULTS))?), hurry: parse_hurry(&variable(HURRY))? };
    // Whoever arms twice has armed.
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

/// How long to wait where `patience` is meant.
pub fn patience(patience: Duration) -> Duration {
    ORDERS.get().map_or(patience, |orders| patience / orders.hurry)
}

/// A place where nothing can fail any more.
pub fn pass(point: Point) {
    // No failure can be ordered there.
    let _ = self::point(point);
}

/// A place where an error can be returned.
///
/// # Errors
/// The one that is ordered.
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
        // To this thread: sent to the process, another one might be the first to stop, and this one go on meanwhile.
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

/// A worker is in the middle of this.
pub fn batch(batch: Batch) {
    if doomed(batch).load(Ordering::Relaxed) {
        // Only a process without a number to send signals to would go on.
        let _ = raise(Signal::SIGKILL);
    }
}

/// Lowers the limit to the lowest number that is free: those above it stay open.
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
    fn what_is_ordered_is_understood_in_its_order() {
        assert_eq!(parse("").unwrap(), []);
        assert_eq!(
            parse("target-vmm/taken:kill,source-vmm/saved:fail").unwrap(),
            [(Point::TargetVmmTaken, Action::Kill), (Point::SourceVmmSaved, Action::Fail)]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let refused = |text| parse(text).unwrap_err().to_string();
        assert!(refused("source-vmm/saved").contains("\"source-vmm/saved\" is not name:action"));
        assert!(refused("source-vmm/lost:kill").contains("no fault point \"source-vmm/lost\""));
        assert!(refused("source-vmm/saved:explode").contains("no action \"explode\""));
        assert!(refused("target-vmm/taken:fail").contains("nothing can fail at \"target-vmm/taken\""));
        assert!(parse_hurry("0").is_err() && parse_hurry("x").is_err());
        assert_eq!((parse_hurry(""), parse_hurry("10")), (Ok(1), Ok(10)));
    }
}
