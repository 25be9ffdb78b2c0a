//! Orders for the programs that are built with fault points.

pub use baton_faults::{Party, Point};

/// What a process does at a fault point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Kills itself.
    Kill,
    /// Stops itself (`SIGSTOP`).
    Stop,
    /// Returns an error.
    Fail,
    /// Can open no further descriptor from then on.
    NoFile,
    /// Goes no further, and kills itself after it has written a batch of frames to guest memory and before it reports
    /// them as used.
    Receiving,
    /// Goes no further, and kills itself after it has sent a batch of frames and before it reports them as used.
    Sending,
}

impl Action {
    /// Whether the action ends the process.
    pub fn kills(self) -> bool {
        matches!(self, Self::Kill | Self::Receiving | Self::Sending)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Fail => "fail",
            Self::NoFile => "nofile",
            Self::Receiving => "receiving",
            Self::Sending => "sending",
        }
    }
}

/// The orders for a process. Without any, the process is the program as shipped.
#[derive(Clone, Debug)]
pub struct Faults {
    orders: Vec<(Point, Action)>,
    hurry: u32,
}

impl Default for Faults {
    fn default() -> Self {
        Self { orders: Vec::new(), hurry: 1 }
    }
}

impl Faults {
    /// Returns one action at one point.
    pub fn at(point: Point, action: Action) -> Self {
        Self { orders: vec![(point, action)], hurry: 1 }
    }

    /// Returns the same action at each of these points.
    pub fn at_each(points: impl IntoIterator<Item = Point>, action: Action) -> Self {
        Self { orders: points.into_iter().map(|point| (point, action)).collect(), hurry: 1 }
    }

    /// Divides by `hurry` the process's timers of hand-overs, waits of a migration for a message, and limit for a
    /// back-end's reply (`BATON_HURRY`).
    #[must_use]
    pub fn hurried(self, hurry: u32) -> Self {
        Self { hurry, ..self }
    }

    /// Returns the orders for the points of these parties, with the same divisor of timeouts.
    #[must_use]
    pub fn of(&self, parties: &[Party]) -> Self {
        let orders = self.orders.iter().copied().filter(|(point, _)| parties.contains(&point.party()));
        Self { orders: orders.collect(), hurry: self.hurry }
    }

    /// Whether there is an order for this point.
    pub fn has(&self, point: Point) -> bool {
        self.orders.iter().any(|(at, _)| *at == point)
    }

    /// Whether the process must be a program with fault points.
    pub fn any(&self) -> bool {
        !self.orders.is_empty() || self.hurry != 1
    }

    /// The environment variables that carry the orders.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let orders: Vec<_> =
            self.orders.iter().map(|(point, action)| format!("{}:{}", point.name(), action.name())).collect();
        [("BATON_FAULT", orders.join(",")), ("BATON_HURRY", self.hurry.to_string())]
    }
}

/// Whether the log of a process says that it took this action at this fault point.
pub fn has_reached(log: &str, point: Point, action: Action) -> bool {
    let line = format!("fault point {}: {}", point.name(), action.name());
    log.lines().any(|said| said == line)
}
