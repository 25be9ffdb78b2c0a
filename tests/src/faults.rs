//! What the programs with fault points are told to do.

pub use baton_faults::{Party, Point};

/// What a process does at a fault point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It kills itself.
    Kill,
    /// It stops.
    Stop,
    /// It fails.
    Fail,
    /// It has no descriptor to spare from then on.
    NoFile,
    /// It goes no further, and kills itself with frames in the guest's memory of which the guest was not told.
    Receiving,
    /// Likewise with frames that have gone out.
    Sending,
}

impl Action {
    /// Whether the process dies of it.
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

/// What a process is told. Without faults and hurry it is one of the programs that are shipped.
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
    /// This one.
    pub fn at(point: Point, action: Action) -> Self {
        Self { orders: vec![(point, action)], hurry: 1 }
    }

    /// The same action at all of these.
    pub fn at_each(points: impl IntoIterator<Item = Point>, action: Action) -> Self {
        Self { orders: points.into_iter().map(|point| (point, action)).collect(), hurry: 1 }
    }

    /// Every patience so many times shorter.
    #[must_use]
    pub fn hurried(self, hurry: u32) -> Self {
        Self { hurry, ..self }
    }

    /// Those that concern this process, and the hurry.
    #[must_use]
    pub fn of(&self, parties: &[Party]) -> Self {
        let orders = self.orders.iter().copied().filter(|(point, _)| parties.contains(&point.party()));
        Self { orders: orders.collect(), hurry: self.hurry }
    }

    /// Whether something is to happen at this point.
    pub fn has(&self, point: Point) -> bool {
        self.orders.iter().any(|(at, _)| *at == point)
    }

    /// Whether it is a program with fault points.
    pub fn any(&self) -> bool {
        !self.orders.is_empty() || self.hurry != 1
    }

    /// Its environment.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let orders: Vec<_> =
            self.orders.iter().map(|(point, action)| format!("{}:{}", point.name(), action.name())).collect();
        [("BATON_FAULT", orders.join(",")), ("BATON_HURRY", self.hurry.to_string())]
    }
}

/// Whether a process has come by a fault point and done this there, by its log.
pub fn has_reached(log: &str, point: Point, action: Action) -> bool {
    let line = format!("fault point {}: {}", point.name(), action.name());
    log.lines().any(|said| said == line)
}
