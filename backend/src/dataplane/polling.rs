//! How long a worker polls for work before it sleeps (`--poll-us`).
//!
//! A sleep costs processor time: the system call, two context switches, and on a virtual machine a halt. Polling
//! through a gap that is shorter than that is cheaper, and the work starts earlier. So with [`PollTime::Auto`] the
//! worker measures what a sleep costs and polls for at most as long. Each kind of work has an account of its own,
//! because what follows differs: a driver that has received a frame may answer within a microsecond, while the network
//! answers a frame later. A poll that finds work earns what the sleep would have cost, less its own time. One in vain
//! costs its time. A poll may only spend what its account has, so polling never costs more than it has saved. An attempt
//! before one in `SAMPLE` sleeps is free: it discovers that polling has begun to pay.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// The longest poll time of [`PollTime::Auto`], whatever a sleep costs.
const LONGEST: Duration = Duration::from_micros(50);
/// Shorter polls are left out: they find nothing.
const SHORTEST: Duration = Duration::from_micros(1);
/// Of so many sleeps without credit, one is measured and one is preceded by polling.
const SAMPLE: u32 = 128;
const HALF: u32 = SAMPLE / 2;
/// One in so many polls in vain is followed by a measurement.
const FAILURE_SAMPLE: u32 = 4;
/// The most failures in a row that credit pays for.
const FAILURES: u32 = 8;
/// The cost of a sleep is the mean of so many measurements, of which earlier ones count less. Before the first so many
/// sleeps there is no polling.
const MEASUREMENTS: u32 = 4;

/// The longest fixed poll time, in microseconds.
pub const MAX_POLL_US: u32 = 1_000_000;

/// How long a worker polls before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollTime {
    /// As long as polling pays, which may be not at all.
    #[default]
    Auto,
    /// Always this time. Zero: not at all.
    Fixed(Duration),
}

impl FromStr for PollTime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        match text.parse() {
            Ok(us @ 0..=MAX_POLL_US) => Ok(Self::Fixed(Duration::from_micros(us.into()))),
            _ => Err(format!("expected auto or a number from 0 to {MAX_POLL_US}")),
        }
    }
}

impl fmt::Display for PollTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(time) => write!(f, "{}", time.as_micros()),
        }
    }
}

/// What a turn did last before there was nothing more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// It passed frames to the guest.
    Received,
    /// It passed frames to the network.
    Sent,
    /// Both.
    Both,
}

impl Work {
    /// Returns the work of a turn, or `None` if the turn moved nothing.
    pub fn of(received: bool, sent: bool) -> Option<Self> {
        match (received, sent) {
            (true, true) => Some(Self::Both),
            (true, false) => Some(Self::Received),
            (false, true) => Some(Self::Sent),
            (false, false) => None,
        }
    }
}

/// What to do before a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Sleep,
    /// Sleep, and measure what that costs.
    Measure,
    /// Poll for this time first.
    Poll(Duration),
}

/// The experience with polling after one kind of work.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// The mean processor time of a sleep.
    cost: Duration,
    /// The number of measurements, [`MEASUREMENTS`] at most.
    measurements: u32,
    /// What polling has saved, less what it has cost.
    credit: Duration,
    /// Decisions to sleep at once since the last poll without credit.
    sleeps: u32,
    /// Polls in vain since the last measurement.
    failures: u32,
}

impl Account {
    /// Decides what to do before a sleep.
    fn decide(&mut self) -> Decision {
        if self.measurements < MEASUREMENTS {
            return Decision::Measure;
        }
        let time = self.cost.min(self.credit);
        if time >= SHORTEST {
            return Decision::Poll(time);
        }
        self.sleeps += 1;
        match self.sleeps {
            SAMPLE => {
                self.sleeps = 0;
                Decision::Poll(self.cost)
            }
            HALF => Decision::Measure,
            _ => Decision::Sleep,
        }
    }

    /// Notes that polling found work after `gap`.
    fn succeeded(&mut self, gap: Duration) {
        self.credit = (self.credit + self.cost).saturating_sub(gap).min(FAILURES * self.cost);
    }

    /// Notes that polling for `time` found nothing. Returns whether to measure the sleep that follows.
    fn failed(&mut self, time: Duration) -> bool {
        self.credit = self.credit.saturating_sub(time);
        self.failures = (self.failures + 1) % FAILURE_SAMPLE;
        self.failures == 0
    }

    /// Notes what a sleep cost.
    fn measured(&mut self, cost: Duration) {
        self.measurements = (self.measurements + 1).min(MEASUREMENTS);
        let earlier = self.cost * (self.measurements - 1);
        self.cost = ((earlier + cost) / self.measurements).min(LONGEST);
    }
}

/// A worker's polling.
#[derive(Debug)]
pub struct Polling {
    setting: PollTime,
    accounts: [Account; 3],
    /// What the worker did last.
    last: Work,
    /// The worker has worked since it last decided how long to poll.
    worked: bool,
    /// Since when and how long the worker polls.
    current: Option<(Instant, Duration)>,
    /// The next sleep is to be measured.
    measures: bool,
}

impl Polling {
    /// Creates the polling of a worker that has not worked yet.
    pub fn new(setting: PollTime) -> Self {
        Self {
            setting,
            accounts: [Account::default(); 3],
            last: Work::Both,
            worked: false,
            current: None,
            measures: false,
        }
    }

    /// Returns whether the worker may poll at all.
    pub fn is_enabled(&self) -> bool {
        self.setting != PollTime::Fixed(Duration::ZERO)
    }

    /// Returns whether the worker always polls before it sleeps.
    pub fn is_fixed(&self) -> bool {
        self.is_enabled() && self.setting != PollTime::Auto
    }

    /// Returns the fixed poll time, or zero if there is none.
    pub fn fixed(&self) -> Duration {
        match self.setting {
            PollTime::Auto => Duration::ZERO,
            PollTime::Fixed(time) => time,
        }
    }

    fn account(&mut self) -> &mut Account {
        &mut self.accounts[self.last as usize]
    }

    /// Notes that the worker has begun with its pair.
    pub fn begin(&mut self) {
        self.current = None;
        self.measures = false;
        self.worked = true;
    }

    /// Notes that the worker has worked.
    pub fn worked(&mut self, work: Work) {
        if let Some((since, _)) = self.current.take() {
            self.account().succeeded(since.elapsed());
        }
        self.last = work;
        self.worked = true;
        self.measures = false;
    }

    /// Decides whether a worker without work polls now rather than sleeps. It polls only after it has worked.
    pub fn goes_on(&mut self) -> bool {
        if let Some((since, time)) = self.current {
            if since.elapsed() < time {
                return true;
            }
            self.current = None;
            self.measures = self.account().failed(time) && self.setting == PollTime::Auto;
        } else if std::mem::take(&mut self.worked) {
            let decision = match self.setting {
                PollTime::Fixed(time) => Decision::Poll(time),
                PollTime::Auto => self.account().decide(),
            };
            match decision {
                Decision::Poll(time) if !time.is_zero() => {
                    self.current = Some((Instant::now(), time));
                    return true;
                }
                Decision::Poll(_) | Decision::Sleep => {}
                Decision::Measure => self.measures = true,
            }
        }
        false
    }

    /// Returns the thread's processor time if the coming sleep is to be measured. Pass it to [`Self::slept`] afterwards.
    pub fn sleeps(&mut self) -> Option<Duration> {
        if std::mem::take(&mut self.measures) { processor_time() } else { None }
    }

    /// Notes that the thread has slept since its processor time was `before`.
    pub fn slept(&mut self, before: Duration) {
        if let Some(now) = processor_time() {
            self.account().measured(now.saturating_sub(before));
        }
    }
}

/// Returns the processor time of the calling thread.
fn processor_time() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Duration = Duration::from_micros(10);

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    /// Simulates `rounds` gaps of `gap` each. Returns the processor time that polling and sleeping took.
    fn spend(account: &mut Account, rounds: u32, mut gap: impl FnMut(u32) -> Duration) -> Duration {
        let mut spent = Duration::ZERO;
        for round in 0..rounds {
            let gap = gap(round);
            let measures = match account.decide() {
                Decision::Poll(time) if gap < time => {
                    account.succeeded(gap);
                    spent += gap;
                    continue;
                }
                Decision::Poll(time) => {
                    spent += time;
                    account.failed(time)
                }
                decision => decision == Decision::Measure,
            };
            spent += COST;
            if measures {
                account.measured(COST);
            }
        }
        spent
    }

    fn experienced() -> Account {
        Account { cost: COST, measurements: MEASUREMENTS, ..Account::default() }
    }

    #[test]
    fn short_gaps_are_polled_through() {
        let mut account = Account::default();
        let spent = spend(&mut account, 10_000, |_| us(2));
        assert!(spent < 10_000 * us(2) * 11 / 10, "{spent:?}");
    }

    #[test]
    fn gaps_longer_than_a_sleep_costs_are_slept_through() {
        for gap in [11, 100, 1_000_000] {
            let spent = spend(&mut Account::default(), 10_000, |_| us(gap));
            assert!(spent < 10_000 * COST * 101 / 100, "{gap}: {spent:?}");
        }
    }

    #[test]
    fn a_sleep_that_did_not_happen_is_outweighed_by_later_ones() {
        // An event that comes just before the sleep makes it cost next to nothing.
        let mut account = Account::default();
        (0..MEASUREMENTS).for_each(|_| account.measured(us(1)));
        let spent = spend(&mut account, 10_000, |_| us(2));
        assert!(spent < 10_000 * us(2) * 13 / 10, "{spent:?}");
    }

    #[test]
    fn polling_never_costs_more_than_it_saves_and_the_samples() {
        // Whatever the gaps are.
        for seed in 0..100u64 {
            let mut state = seed;
            let mut random = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                us((state >> 33) % (2 + seed / 2))
            };
            let spent = spend(&mut experienced(), 10_000, &mut random);
            assert!(spent <= 10_000 * COST * 101 / 100, "{seed}: {spent:?}");
        }
    }

    #[test]
    fn polling_ends_soon_after_gaps_become_long_and_resumes_after_they_become_short() {
        let mut account = experienced();
        spend(&mut account, 1000, |_| us(1));
        assert_eq!(account.decide(), Decision::Poll(COST));
        let spent = spend(&mut account, 100, |_| us(1000));
        assert!(spent <= 100 * COST + (FAILURES + 1) * COST, "{spent:?}");
        assert_eq!(account.decide(), Decision::Sleep);
        let spent = spend(&mut account, 1000, |_| us(1));
        assert!(spent < 1000 * us(1) + 2 * SAMPLE * COST, "{spent:?}");
    }

    #[test]
    fn a_worker_polls_only_after_work_and_each_kind_of_work_has_its_account() {
        let mut polling = Polling::new(PollTime::Auto);
        assert!(!polling.goes_on());
        polling.accounts[Work::Sent as usize] = experienced();
        polling.accounts[Work::Sent as usize].credit = 2 * LONGEST;
        polling.worked(Work::Received);
        assert!(!polling.goes_on());
        // The first sleeps after each kind of work are measured.
        let before = polling.sleeps().unwrap();
        polling.slept(before);
        assert_eq!(polling.accounts[Work::Received as usize].measurements, 1);
        polling.worked(Work::Sent);
        assert!(polling.goes_on());
        while polling.goes_on() {}
        assert!(!polling.goes_on());
        assert_eq!(polling.sleeps(), None);
    }

    #[test]
    fn a_fixed_time_is_polled_after_all_work_and_zero_never() {
        let mut polling = Polling::new(PollTime::Fixed(us(1)));
        polling.begin();
        for work in [Work::Received, Work::Sent, Work::Both] {
            assert!(polling.goes_on());
            while polling.goes_on() {}
            polling.worked(work);
        }
        let mut never = Polling::new(PollTime::Fixed(Duration::ZERO));
        never.worked(Work::Sent);
        assert!(!never.is_enabled() && !never.goes_on());
    }

    #[test]
    fn settings_are_parsed_and_written() {
        assert_eq!("auto".parse(), Ok(PollTime::Auto));
        assert_eq!("0".parse(), Ok(PollTime::Fixed(Duration::ZERO)));
        assert_eq!("1000000".parse(), Ok(PollTime::Fixed(Duration::from_secs(1))));
        for right in ["auto", "0", "50"] {
            assert_eq!(right.parse::<PollTime>().unwrap().to_string(), right);
        }
        for wrong in ["", "-1", "1000001", "Auto", "10us"] {
            assert!(wrong.parse::<PollTime>().unwrap_err().contains("auto or a number from 0 to 1000000"));
        }
    }
}
