//! Reasons for a refusal, as they are sent to a peer. Each has a stable name, for scripts and the operator's manual,
//! and a text that may change.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The most reasons that are kept from a peer.
const MAX_REASONS: usize = 64;
/// The longest name or text that is kept, in characters.
const MAX_TEXT: usize = 512;

/// One reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The name, which is the same in every version.
    pub name: String,
    /// The text for the operator.
    pub text: String,
}

/// All reasons for one refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reasons(pub Vec<Reason>);

impl Reasons {
    /// Collects refusals.
    pub fn of<R>(refusals: impl IntoIterator<Item = R>) -> Self
    where
        R: Into<Reason>,
    {
        Self(refusals.into_iter().map(Into::into).collect())
    }

    /// Succeeds if there are no refusals.
    ///
    /// # Errors
    /// Returns all `refusals` if there are any.
    pub fn none_of<R>(refusals: Vec<R>) -> Result<(), Self>
    where
        R: Into<Reason>,
    {
        if refusals.is_empty() { Ok(()) } else { Err(Self::of(refusals)) }
    }

    /// Makes a peer's reasons safe to show: limits their number and length and removes control characters.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        self.0.truncate(MAX_REASONS);
        for reason in &mut self.0 {
            for text in [&mut reason.name, &mut reason.text] {
                *text = text.chars().filter(|character| !character.is_control()).take(MAX_TEXT).collect();
            }
        }
        self
    }
}

impl fmt::Display for Reasons {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return formatter.write_str("no reason given");
        }
        for (number, Reason { name, text }) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { "; " };
            write!(formatter, "{separator}{name}: {text}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Reasons {}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(name: &str, text: &str) -> Reason {
        Reason { name: name.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn display_lists_every_reason_with_its_name() {
        let reasons = Reasons::of([reason("a", "first"), reason("b", "second")]);
        assert_eq!(reasons.to_string(), "a: first; b: second");
        assert_eq!(Reasons::default().to_string(), "no reason given");
        assert_eq!(Reasons::none_of(reasons.0.clone()), Err(reasons));
        assert_eq!(Reasons::none_of(Vec::<Reason>::new()), Ok(()));
    }

    #[test]
    fn peer_reasons_are_bounded_and_stripped_of_control_characters() {
        let reasons = Reasons(vec![reason("x\n\u{1b}[31m", &"y".repeat(10_000)); 1000]).bounded();
        assert_eq!(reasons.0.len(), MAX_REASONS);
        assert_eq!(reasons.0[0].name, "x[31m");
        assert_eq!(reasons.0[0].text.len(), MAX_TEXT);
    }
}
