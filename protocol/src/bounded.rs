//! Bounded deserialisation of a peer's lists: at most one element beyond the limit is kept. The extra element lets the
//! check refuse the list by name; the rest takes no memory.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Deserialises a list and keeps its first `MOST + 1` elements.
pub(crate) fn list<'de, const MOST: usize, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_seq(List::<MOST, T>(PhantomData))
}

struct List<const MOST: usize, T>(PhantomData<T>);

impl<'de, const MOST: usize, T: Deserialize<'de>> Visitor<'de> for List<MOST, T> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while list.len() <= MOST {
            let Some(element) = sequence.next_element()? else { return Ok(list) };
            list.push(element);
        }
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Body {
        #[serde(deserialize_with = "list::<3, _, _>")]
        numbers: Vec<u8>,
        after: bool,
    }

    #[test]
    fn overlong_list_is_truncated_to_one_element_over_the_limit() {
        for (sent, kept) in [(0, 0), (3, 3), (4, 4), (1000, 4)] {
            let text = serde_json::json!({ "numbers": vec![7; sent], "after": true }).to_string();
            let body: Body = serde_json::from_str(&text).unwrap();
            assert_eq!(body, Body { numbers: vec![7; kept], after: true });
        }
    }
}
