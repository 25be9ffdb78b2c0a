//! The values of the word that says who owns what is handed over. It lies in memory shared by source and target, and
//! changes by compare-and-swap only: whoever's swap wins owns, whatever was or was not said.
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
//! Each offer has an epoch of its own, so who heard of an old one cannot take a later one. `Target` and `Aborted` are
//! final as long as both live: the next hand-over has a word of its own. What is dashed is for the one whose peer is
//! *proven* dead, by a pidfd: a connection that has ended, or silence, proves nothing.
//!
//! A target settles before it does what makes the source's knowledge old: before it hears the front-end of a session
//! it has taken. From then on there is nothing to survive with. A device on its own, which has no session, is not
//! settled.

/// Who owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// Neither yet: the first that takes it. Nobody uses it meanwhile.
    Offered,
    /// The target, for good while it lives.
    Target,
    /// The source, for good.
    Aborted,
    /// The target, for good: what the source still knows is old.
    Settled,
}

impl Owner {
    /// Whether the target has it. The source obeys this even where nothing was offered: there must not be two owners.
    pub fn is_target(self) -> bool {
        matches!(self, Self::Target | Self::Settled)
    }
}

/// How a compare-and-swap of the word ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapOutcome {
    /// The word is what it was to become.
    Won,
    /// The other process was faster: the word is this.
    Lost(Word),
    /// The word has a value that no word has. It gives nothing to the target, whose own swap fails as well.
    Meaningless,
}

/// A swap did not win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unexpected ownership word")]
pub struct NotSwapped(pub SwapOutcome);

impl SwapOutcome {
    /// For a swap that has no way to lose.
    ///
    /// # Errors
    /// [`NotSwapped`].
    pub fn must_win(self) -> Result<(), NotSwapped> {
        if self == Self::Won { Ok(()) } else { Err(NotSwapped(self)) }
    }
}

/// What an offer is worth when the target reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It stands.
    Stands,
    /// The source took it back before the target read it. That is no fault: a later offer counts.
    Withdrawn,
    /// The word cannot be this after such an offer.
    Impossible,
}

/// Who owns, and how often it was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The number of the last offer, less than 2^56; 0 before the first.
    pub epoch: u64,
    /// Who owns.
    pub owner: Owner,
}

/// The shared word has a value that has no meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ownership word has no meaning: {0:#x}")]
pub struct WordError(pub u64);

impl Word {
    /// Before the first offer.
    pub const INITIAL: Self = Self { epoch: 0, owner: Owner::Source };

    /// How it lies in memory.
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

    /// What lies in memory.
    ///
    /// # Errors
    /// [`WordError`].
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

    /// The source offers it. `None` where it is not the source's to offer.
    pub fn offered(self) -> Option<Self> {
        let epoch = self.epoch + 1;
        (self.owner == Owner::Source && epoch < 1 << 56).then_some(Self { epoch, owner: Owner::Offered })
    }

    /// The target takes what is offered. `None` where it is not offered.
    pub fn taken(self) -> Option<Self> {
        self.out_of_offer(Owner::Target)
    }

    /// The source takes back what it offered, and may offer it again. `None` where it is not offered.
    pub fn taken_back(self) -> Option<Self> {
        self.out_of_offer(Owner::Source)
    }

    /// The source ends the hand-over: nothing can be offered or taken any more. `None` where it is over already.
    pub fn aborted(self) -> Option<Self> {
        matches!(self.owner, Owner::Source | Owner::Offered).then_some(Self { owner: Owner::Aborted, ..self })
    }

    /// The target makes it final that it has taken it. `None` where it has not.
    pub fn settled(self) -> Option<Self> {
        (self.owner == Owner::Target).then_some(Self { owner: Owner::Settled, ..self })
    }

    /// The target takes what a dead source has not given up. `None` where the source gave nothing, or not to it. Legal
    /// only on proof that the source is dead, and for a target that holds all there is to take.
    pub fn survived_by_target(self) -> Option<Self> {
        matches!(self.owner, Owner::Source | Owner::Offered).then_some(Self { owner: Owner::Target, ..self })
    }

    /// The source takes back what a dead target had taken. `None` where that took nothing. Legal only on proof that the
    /// target is dead, and for a source that holds everything still.
    pub fn survived_by_source(self) -> Option<Self> {
        (self.owner == Owner::Target).then_some(Self { owner: Owner::Aborted, ..self })
    }

    /// What the offer `epoch` is worth while the word is this. A message may be read late, the word is always current.
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
    fn every_word_survives_its_bits() {
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
    fn what_is_final_stays_while_both_live() {
        for owner in [Owner::Target, Owner::Aborted, Owner::Settled] {
            let word = Word { epoch: 3, owner };
            assert_eq!([word.offered(), word.taken(), word.taken_back(), word.aborted()], [None; 4]);
        }
    }

    #[test]
    fn a_survivor_takes_what_the_dead_one_had() {
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
    fn an_offer_that_is_older_than_the_word_was_withdrawn() {
        let judged = |epoch| OWNERS.map(|owner| Word { epoch: 3, owner }.judge_offer(epoch));
        use super::Offered::{Impossible, Stands, Withdrawn};
        assert_eq!(judged(2), [Withdrawn, Withdrawn, Impossible, Withdrawn, Impossible]);
        assert_eq!(judged(3), [Withdrawn, Stands, Impossible, Withdrawn, Impossible]);
        assert_eq!(judged(4), [Impossible; 5]);
    }

    #[test]
    fn only_what_is_offered_is_taken_and_each_offer_is_another() {
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
