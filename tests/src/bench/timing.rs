//! Records the longest gap between two frames of one direction, and the longest delay of a frame.

use super::message::Worst;

/// The times of one direction.
#[derive(Debug, Default)]
pub struct Timing {
    /// When the last frame arrived.
    arrived: Option<u64>,
    worst: Worst,
}

impl Timing {
    /// Records the arrival at `now` of a frame that was sent at `stamp`, both in nanoseconds.
    pub fn arrive(&mut self, stamp: u64, now: u64) {
        let gap = self.arrived.replace(now).map_or(0, |before| now.saturating_sub(before));
        self.worst = self.worst.or(Worst { gap, delay: now.saturating_sub(stamp) });
    }

    /// Returns the longest gap and delay since the last call.
    pub fn take_worst(&mut self) -> Worst {
        std::mem::take(&mut self.worst)
    }

    /// Forgets the last arrival: the next gap begins at the next frame.
    pub fn restart(&mut self) {
        self.arrived = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_and_delay_of_an_interval_are_kept() {
        let mut timing = Timing::default();
        for (sent, arrived) in [(10, 15), (20, 45), (50, 55)] {
            timing.arrive(sent, arrived);
        }
        assert_eq!(timing.take_worst(), Worst { gap: 30, delay: 25 });
        assert_eq!(timing.take_worst(), Worst::default());
    }
}
