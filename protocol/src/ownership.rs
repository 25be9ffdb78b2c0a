//! The values of the ownership word, which decides which process owns what is handed over. The word lies in memory that
//! source and target share, and only changes by compare-and-swap: the process whose swap wins is the owner, whatever
//! messages were sent or lost.
//!
//! ```text
//!              offer (epoch + 1)              take           settle
//!   Source ─────────────────────▶ Offered ───────────▶ Target ───────▶ Settled
//!     ▲  │ ╎                        │                  ▲ ╎
//!     │  │ ╎           survive      │                  ╎ ╎ survive
//!     │  │ └╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌┼╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌┘ ▼
//!     │  └──────────── abort ───────┴────▶ Aborted ◀╌╌╌╌╌╌
//!     └───────── take back ─────────┘
//! ```
//! Each offer has a new epoch, so a target that reads an old offer cannot take a later one. `Target` and `Aborted` are
//! final while both processes live: the next hand-over uses a new word. The dashed transitions are for a survivor,
//! whose peer is *proven* dead by a pidfd. A closed connection or silence proves nothing.
//!
//! A target settles before it makes the source's knowledge stale, that is, before it reads from the front-end of a
//! session that it has taken. From then on the source cannot take the session back. A device that is handed over
//! without a session is never settled.

/// The owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// Undecided: the process whose swap wins. Neither process uses what is offered.
    Offered,
    /// The target, as long as it lives.
    Target,
    /// The source, finally.
    Aborted,
    /// The target, finally: the source's knowledge is stale.
    Settled,
}

impl Owner {
    /// Returns whether the target is the owner. The source obeys this even if it offered nothing: there must never be
    /// two owners.
    pub fn is_target(self) -> bool {
        matches!(self, Self::Target | Self::Settled)
    }
}

/// The outcome of a compare-and-swap of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapOutcome {
    /// The word has the new value.
    Won,
    /// The other process was faster: the word has this value.
    Lost(Word),
    /// The word is invalid. The target cannot own anything then, because its swap fails as well.
    Meaningless,
}

/// A swap that must win did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unexpected ownership word")]
pub struct NotSwapped(pub SwapOutcome);

impl SwapOutcome {
    /// Checks a swap that the other process cannot win.
    ///
    /// # Errors
    /// Returns [`NotSwapped`] unless the swap won.
    pub fn must_win(self) -> Result<(), NotSwapped> {
        if self == Self::Won { Ok(()) } else { Err(NotSwapped(self)) }
    }
}

/// The state of an offer when the target reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// The offer is open.
    Stands,
    /// The source withdrew the offer before the target read it. This is not an error: a later offer may follow.
    Withdrawn,
    /// The word cannot have this value after such an offer.
    Impossible,
}

/// The ownership word: the owner, and the number of offers so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The number of the last offer, less than 2^56; 0 before the first.
    pub epoch: u64,
    /// The owner.
    pub owner: Owner,
}

/// The shared word has an invalid value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid ownership word {0:#x}")]
pub struct WordError(pub u64);

impl Word {
    /// The word before the first offer.
    pub const INITIAL: Self = Self { epoch: 0, owner: Owner::Source };

    /// Encodes the word as it is stored in shared memory.
    pub fn to_bits(self) -> u64 {
        let owner = match self.owner {
            Owner::Source => 0,
            Owner::Offered => 1,
            Owner::Target => 2,
            Owner::Aborted => 3,
            Owner::Settled => 4,
        };
        self.epoch << 8 | owner
    }

    /// Decodes a word from shared memory.
    ///
    /// # Errors
    /// Returns [`WordError`] if `bits` name no owner.
    pub fn from_bits(bits: u64) -> Result<Self, WordError> {
        let owner = match bits & 0xff {
            0 => Owner::Source,
            1 => Owner::Offered,
            2 => Owner::Target,
            3 => Owner::Aborted,
            4 => Owner::Settled,
            _ => return Err(WordError(bits)),
        };
        Ok(Self { epoch: bits >> 8, owner })
    }

    /// Returns the word after the source offers. `None` if the source is not the owner or the epochs are exhausted.
    pub fn offered(self) -> Option<Self> {
        let epoch = self.epoch + 1;
        (self.owner == Owner::Source && epoch < 1 << 56).then_some(Self { epoch, owner: Owner::Offered })
    }

    /// Returns the word after the target takes an offer. `None` if there is no offer.
    pub fn taken(self) -> Option<Self> {
        self.out_of_offer(Owner::Target)
    }

    /// Returns the word after the source withdraws its offer; it may offer again. `None` if there is no offer.
    pub fn taken_back(self) -> Option<Self> {
        self.out_of_offer(Owner::Source)
    }

    /// Returns the word after the source aborts: no further offer or take is possible. `None` if the word is final.
    pub fn aborted(self) -> Option<Self> {
        matches!(self.owner, Owner::Source | Owner::Offered).then_some(Self { owner: Owner::Aborted, ..self })
    }

    /// Returns the word after the target settles its take. `None` if it has taken nothing.
    pub fn settled(self) -> Option<Self> {
        (self.owner == Owner::Target).then_some(Self { owner: Owner::Settled, ..self })
    }

    /// Returns the word after the target takes over from a dead source. `None` if the word is final. Only legal if the
    /// source is proven dead and the target holds everything.
    pub fn survived_by_target(self) -> Option<Self> {
        matches!(self.owner, Owner::Source | Owner::Offered).then_some(Self { owner: Owner::Target, ..self })
    }

    /// Returns the word after the source takes back what a dead target took. `None` if the target took nothing or has
    /// settled. Only legal if the target is proven dead and the source still holds everything.
    pub fn survived_by_source(self) -> Option<Self> {
        (self.owner == Owner::Target).then_some(Self { owner: Owner::Aborted, ..self })
    }

    /// Judges offer `epoch` against the current word. The target may read a message late; the word is always current.
    pub fn judge_offer(self, epoch: u64) -> Offered {
        match self.owner {
            Owner::Offered if self.epoch == epoch => Offered::Stands,
            Owner::Offered if self.epoch > epoch => Offered::Withdrawn,
            Owner::Source | Owner::Aborted if self.epoch >= epoch => Offered::Withdrawn,
            _ => Offered::Impossible,
        }
    }

    fn out_of_offer(self, owner: Owner) -> Option<Self> {
        (self.owner == Owner::Offered).then_some(Self { owner, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNERS: [Owner; 5] = [Owner::Source, Owner::Offered, Owner::Target, Owner::Aborted, Owner::Settled];

    #[test]
    fn word_round_trips_through_its_bits() {
        for owner in OWNERS {
            for epoch in [0, 1, (1 << 56) - 1] {
                let word = Word { epoch, owner };
                assert_eq!(Word::from_bits(word.to_bits()), Ok(word));
            }
        }
        assert_eq!(Word::from_bits(0x0105), Err(WordError(0x0105)));
        assert_eq!(Word::INITIAL.to_bits(), 0);
    }

    #[test]
    fn final_word_permits_no_transition_while_both_live() {
        for owner in [Owner::Target, Owner::Aborted, Owner::Settled] {
            let word = Word { epoch: 3, owner };
            assert_eq!([word.offered(), word.taken(), word.taken_back(), word.aborted()], [None; 4]);
        }
    }

    #[test]
    fn survivor_takes_over_from_the_dead_peer() {
        let after = |owner| Word { epoch: 3, owner };
        let target = OWNERS.map(|owner| after(owner).survived_by_target().map(|word| word.owner));
        assert_eq!(target, [Some(Owner::Target), Some(Owner::Target), None, None, None]);
        let source = OWNERS.map(|owner| after(owner).survived_by_source().map(|word| word.owner));
        assert_eq!(source, [None, None, Some(Owner::Aborted), None, None]);
        let settled = OWNERS.map(|owner| after(owner).settled().map(|word| word.owner));
        assert_eq!(settled, [None, None, Some(Owner::Settled), None, None]);
        assert_eq!(after(Owner::Target).survived_by_source().unwrap().epoch, 3);
        assert_eq!(after(Owner::Source).survived_by_target().unwrap().epoch, 3);
    }

    #[test]
    fn offer_older_than_the_word_counts_as_withdrawn() {
        let judged = |epoch| OWNERS.map(|owner| Word { epoch: 3, owner }.judge_offer(epoch));
        use super::Offered::{Impossible, Stands, Withdrawn};
        assert_eq!(judged(2), [Withdrawn, Withdrawn, Impossible, Withdrawn, Impossible]);
        assert_eq!(judged(3), [Withdrawn, Stands, Impossible, Withdrawn, Impossible]);
        assert_eq!(judged(4), [Impossible; 5]);
    }

    #[test]
    fn only_an_offer_can_be_taken_and_each_offer_has_a_new_epoch() {
        let first = Word::INITIAL.offered().unwrap();
        assert_eq!((first.epoch, first.owner), (1, Owner::Offered));
        assert_eq!(first.offered(), None);
        assert_eq!(first.taken().unwrap().owner, Owner::Target);
        let second = first.taken_back().unwrap().offered().unwrap();
        assert_ne!(second, first);
        assert_eq!(Word::INITIAL.taken(), None);
        assert_eq!(Word { epoch: (1 << 56) - 1, owner: Owner::Source }.offered(), None);
    }
}
