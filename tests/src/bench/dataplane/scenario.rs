//! The scenarios: which frames go where, and how the driver behaves.

use serde::{Deserialize, Serialize};

use crate::fake_frontend::features;

/// An Ethernet frame of one segment.
const FULL: usize = 1514;
/// A TCP frame of 45 segments: Ethernet, IPv4 and TCP headers, and 45 × 1448 bytes.
pub const LARGE: usize = 54 + 45 * 1448;

/// The direction of the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Traffic {
    /// Guest to TAP, as many frames as the back-end takes.
    Transmit,
    /// TAP to guest, more frames than the back-end takes.
    Receive,
    /// TAP to guest and back.
    ThereAndBack,
    /// As [`Self::Transmit`] and [`Self::Receive`] at the same time.
    BothWays,
    /// One frame at a time, there and back.
    PingPong,
    /// TAP to guest, at a steady rate.
    Paced {
        /// Frames per second.
        rate: u32,
        /// Frames that are sent together.
        burst: u32,
    },
}

/// A row of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scenario {
    /// The direction of the frames.
    pub traffic: Traffic,
    /// Length of a frame, without the virtio-net header.
    pub frame: usize,
    /// Number of queue pairs.
    pub pairs: u16,
    /// Whether the driver waits for calls instead of polling its rings.
    pub sleeps: bool,
    /// Whether the driver negotiates `EVENT_IDX`.
    pub event_idx: bool,
    /// Whether receive buffers are mergeable. If so, a large frame goes into many of 2 KiB, else into one of 64 KiB.
    pub mergeable: bool,
}

const BASE: Scenario = Scenario {
    traffic: Traffic::Transmit,
    frame: 64,
    pairs: 1,
    sleeps: false,
    event_idx: false,
    mergeable: true,
};

const fn transmit(frame: usize) -> Scenario {
    Scenario { frame, ..BASE }
}

const fn receive(frame: usize) -> Scenario {
    Scenario { traffic: Traffic::Receive, frame, ..BASE }
}

/// Returns a steady rate to a driver that sleeps, as a guest does.
const fn paced(rate: u32) -> Scenario {
    Scenario { traffic: Traffic::Paced { rate, burst: 1 }, sleeps: true, event_idx: true, ..BASE }
}

/// All scenarios.
pub const ALL: [Scenario; 24] = [
    transmit(64),
    transmit(512),
    transmit(FULL),
    transmit(LARGE),
    receive(64),
    receive(512),
    receive(FULL),
    receive(LARGE),
    Scenario { mergeable: false, ..receive(LARGE) },
    Scenario { traffic: Traffic::ThereAndBack, ..BASE },
    Scenario { traffic: Traffic::BothWays, ..BASE },
    Scenario { pairs: 2, ..transmit(64) },
    Scenario { pairs: 2, ..receive(64) },
    Scenario { traffic: Traffic::Paced { rate: 100_000, burst: 4 }, ..BASE },
    Scenario { sleeps: true, event_idx: true, ..transmit(64) },
    Scenario { sleeps: true, event_idx: true, ..receive(64) },
    Scenario { traffic: Traffic::PingPong, ..BASE },
    Scenario { traffic: Traffic::PingPong, sleeps: true, event_idx: true, ..BASE },
    paced(1_000),
    paced(10_000),
    paced(50_000),
    paced(100_000),
    Scenario { event_idx: false, ..paced(10_000) },
    Scenario { event_idx: false, ..paced(100_000) },
];

impl Scenario {
    /// Returns whether frames consist of many segments.
    pub fn is_large(&self) -> bool {
        self.frame > FULL
    }

    /// Returns whether only one frame is under way at a time.
    pub fn is_ping_pong(&self) -> bool {
        self.traffic == Traffic::PingPong
    }

    /// Returns whether frames are sent at a fixed rate.
    pub fn is_paced(&self) -> bool {
        matches!(self.traffic, Traffic::Paced { .. })
    }

    /// Returns whether a TAP without virtio can run it.
    pub fn has_bare(&self) -> bool {
        let one_way = matches!(self.traffic, Traffic::Transmit | Traffic::Receive);
        one_way && !self.sleeps && self.pairs == 1
    }

    /// Returns the features that the driver accepts if they are offered.
    pub fn features(&self) -> u64 {
        let mut wanted = features::VERSION_1 | features::PROTOCOL_FEATURES | features::IN_ORDER;
        if self.mergeable {
            wanted |= features::MRG_RXBUF;
        }
        if self.event_idx {
            wanted |= features::EVENT_IDX;
        }
        wanted | self.needed_features()
    }

    /// Returns the features that the scenario requires.
    pub fn needed_features(&self) -> u64 {
        let mut needed = 0;
        if self.is_large() {
            needed |= match self.traffic {
                Traffic::Transmit => features::CSUM | features::HOST_TSO4 | features::HOST_TSO6,
                _ => features::GUEST_CSUM | features::GUEST_TSO4 | features::GUEST_TSO6,
            };
            if self.mergeable && self.traffic == Traffic::Receive {
                needed |= features::MRG_RXBUF;
            }
        }
        if self.pairs > 1 {
            needed |= features::MQ;
        }
        if self.event_idx {
            needed |= features::EVENT_IDX;
        }
        needed
    }

    /// Returns the number of descriptors in each queue. A large frame needs many.
    pub fn queue_size(&self) -> u16 {
        if self.is_large() && self.mergeable { 1024 } else { 256 }
    }

    /// Returns its name in tables.
    pub fn name(&self) -> String {
        let mut name = match self.traffic {
            Traffic::Transmit => "guest → TAP".to_owned(),
            Traffic::Receive => "TAP → guest".to_owned(),
            Traffic::ThereAndBack => "there and back".to_owned(),
            Traffic::BothWays => "both ways at once".to_owned(),
            Traffic::PingPong => "ping-pong".to_owned(),
            Traffic::Paced { rate, burst: 1 } => format!("TAP → guest, {} kpps", rate / 1000),
            Traffic::Paced { rate, burst } => {
                format!("TAP → guest, {} kpps in bursts of {burst}", rate / 1000)
            }
        };
        name += &match self.frame {
            LARGE => ", 64 KiB".to_owned(),
            bytes => format!(", {bytes} B"),
        };
        if self.is_large() && self.traffic == Traffic::Receive {
            name += if self.mergeable { " into 2 KiB buffers" } else { " into 64 KiB buffers" };
        }
        if self.pairs > 1 {
            name += &format!(", {} pairs", self.pairs);
        }
        match (self.sleeps, self.event_idx) {
            (false, false) => {}
            (true, true) => name += ", driver sleeps",
            (true, false) => name += ", driver sleeps, no EVENT_IDX",
            (false, true) => name += ", EVENT_IDX",
        }
        name
    }
}
