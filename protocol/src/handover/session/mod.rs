//! How a back-end gives a running session to another one: the front-end's connection, its memory and rings, and the
//! device, with the front-end none the wiser (DESIGN: "The handover protocol").
//!
//! Who owns the session is said by the [ownership word](crate::ownership), never by a message. **The commit** is the
//! target's swap from `Offered` to `Target`. Before it the source owns, and any failure makes it go on, by a swap to
//! `Aborted`; after it the target owns, unless it is *proven* dead before it has settled.
//!
//! | state | the peer is proven dead | the end of the connection, garbage, a wrong message | time |
//! |---|---|---|---|
//! | source: prologue | ended, never stopped | the same | the same, after 2 s |
//! | source: staging | the word to `Aborted`, goes on | the same | the same, after 10 s |
//! | source: freezing | the word from `Source` to `Aborted`, goes on | the same | the same, 500 ms from the freeze on |
//! | source: committed | the word from `Offered` to `Aborted`: won: goes on; lost: from `Target` to `Aborted`: goes on where the used rings say | won: goes on; lost: lost | the same, 500 ms from the freeze on |
//! | source: lost | from `Target` to `Aborted`: goes on where the used rings say; settled: handed over | stays still until the target settles or dies | looks at the word every 100 ms |
//! | target: prologue, ready, gathering | waits for another | the same | the same, after 2 s |
//! | target: staging | takes it when all is there | goes on, then as staged | it is its own work |
//! | target: staged | the word from `Source` or `Offered` to `Target`: takes it, where the used rings say; aborted: drops it | keeps it until the word is aborted, looks every 100 ms | drops it after 30 s |
//! | target: starting, active | nothing | nothing | nothing |
//!
//! What makes it whole:
//! - The front-end's messages stay in its socket from before STAGE is made until the word is aborted or settled. So what
//!   was staged stays true, for the target as for whoever survives, and no message is heard by two or by none.
//! - Before a target hears the front-end, it settles the word: from then on nobody can survive with what the source
//!   knows, which grows old. It says ACTIVE before that, and the source goes when the word is settled, whether it has
//!   heard ACTIVE or not: so a target that dies before ACTIVE has not taken the session along.
//! - Who is stopped and goes on later asks the word first: the source's every way out is a swap, and its rings stand
//!   still since before the word offered them. A target that sleeps through the time of the source loses its swap.
//! - Events come in the order: what the peer said, its death, the end of the connection, time.
//!
//! [`source`] and [`target`] are the two ends, [`validate`] checks what the source says
//! ([`SessionState`](super::wire::session::SessionState)), [`report`] says how long it took.

pub mod report;
pub mod source;
pub mod target;
pub mod validate;
