//! Summarises measured values as quantiles.

use std::fmt;

/// The median, the 99th percentile and the maximum of a set of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantiles {
    /// The median.
    pub p50: i64,
    /// The 99th percentile.
    pub p99: i64,
    /// The maximum.
    pub max: i64,
}

impl Quantiles {
    /// Computes the quantiles of these values. Returns zeroes if there are none.
    pub fn of(values: impl IntoIterator<Item = i64>) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_unstable();
        // The nearest-rank method: no interpolation.
        let at = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100);
            values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(50), p99: at(99), max: at(100) }
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50, p99, max } = self;
        write!(f, "{p50} / {p99} / {max}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_one_of_the_values() {
        assert_eq!(Quantiles::of((1..=200).rev()), Quantiles { p50: 100, p99: 198, max: 200 });
        assert_eq!(Quantiles::of([7]), Quantiles { p50: 7, p99: 7, max: 7 });
        assert_eq!(Quantiles::of([]), Quantiles::default());
    }
}
