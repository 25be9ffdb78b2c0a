//! Why something cannot be done, as it is said to a peer: reasons with names that stay, for scripts and for the
//! operator's manual, and a text that may change.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The most reasons that are kept of what a peer sent.
const MAX_REASONS: usize = 64;
/// The longest name or text that is kept, in characters.
const MAX_TEXT: usize = 512;

/// One reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Stays the same in every version.
    pub name: String,
    /// For the operator.
    pub text: String,
}

/// All reasons.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reasons(pub Vec<Reason>);

impl Reasons {
    /// Of whatever has names and texts.
    pub fn of<R>(refusals: impl IntoIterator<Item = R>) -> Self
    where
        R: Into<Reason>,
    {
        Self(refusals.into_iter().map(Into::into).collect())
    }

    /// Whether there is any refusal.
    ///
    /// # Errors
    /// All of them.
    pub fn none_of<R>(refusals: Vec<R>) -> Result<(), Self>
    where
        R: Into<Reason>,
    {
        if refusals.is_empty() { Ok(()) } else { Err(Self::of(refusals)) }
    }

    /// What a peer sent, cut to a size that can be shown.
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
    fn all_reasons_are_listed_with_their_names() {
        let reasons = Reasons::of([reason("a", "first"), reason("b", "second")]);
        assert_eq!(reasons.to_string(), "a: first; b: second");
        assert_eq!(Reasons::default().to_string(), "no reason given");
        assert_eq!(Reasons::none_of(reasons.0.clone()), Err(reasons));
        assert_eq!(Reasons::none_of(Vec::<Reason>::new()), Ok(()));
    }

    #[test]
    fn a_peers_reasons_are_bounded_and_plain() {
        let reasons = Reasons(vec![reason("x\n\u{1b}[31m", &"y".repeat(10_000)); 1000]).bounded();
        assert_eq!(reasons.0.len(), MAX_REASONS);
        assert_eq!(reasons.0[0].name, "x[31m");
        assert_eq!(reasons.0[0].text.len(), MAX_TEXT);
    }
}
