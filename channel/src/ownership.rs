//! The ownership word, in memory that the source and the target of a hand-over both map: a sealed memfd of one page.
//! [`baton_protocol::ownership`] defines its values and their transitions.
#![expect(unsafe_code, reason = "maps a memfd and returns a reference to its first word")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_protocol::ownership::{SwapOutcome, Word, WordError};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::sealed_memfd::{self, SealedMemfdError};

/// Length of the memfd.
const SIZE: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Why an ownership word cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum OwnershipError {
    /// A system call failed.
    #[error("cannot set up the ownership word")]
    System(#[from] io::Error),
    /// The received descriptor is not a sealed memfd of one page.
    #[error(transparent)]
    Memfd(#[from] SealedMemfdError),
}

/// The ownership word and its memfd.
#[derive(Debug)]
pub struct SharedWord {
    page: NonNull<AtomicU64>,
    file: OwnedFd,
}

// SAFETY: the page stays mapped for the lifetime of this struct, and is accessed only through an atomic.
unsafe impl Send for SharedWord {}
// SAFETY: as above.
unsafe impl Sync for SharedWord {}

impl SharedWord {
    /// Creates a word with the value [`Word::INITIAL`].
    ///
    /// # Errors
    /// Returns [`OwnershipError::System`] if the memfd cannot be created or mapped.
    pub fn create() -> Result<Self, OwnershipError> {
        Self::map(sealed_memfd::create("baton-ownership", SIZE.get() as u64)?)
    }

    /// Maps the word in a memfd that the peer sent.
    ///
    /// # Errors
    /// Returns an error if the descriptor is not a sealed memfd of one page, or cannot be mapped. The descriptor is
    /// closed.
    pub fn from_fd(file: OwnedFd) -> Result<Self, OwnershipError> {
        Self::map(sealed_memfd::adopt(file, "the ownership word's memfd", SIZE.get() as u64)?)
    }

    fn map(file: File) -> Result<Self, OwnershipError> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Populated now: the guest is stopped during the first swap, which must not fault.
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: creates a new mapping at an address that the kernel chooses.
        let page = unsafe { mmap(None, SIZE, access, flags, &file, 0) };
        Ok(Self { page: page.map_err(io::Error::from)?.cast(), file: file.into() })
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the page is mapped and aligned, and its memfd is sealed against shrinking. Both processes access it
        // only as an atomic, and any bit pattern is a valid u64.
        unsafe { self.page.as_ref() }
    }

    /// Reads the word.
    ///
    /// # Errors
    /// Returns [`WordError`] if the value is not a valid word.
    pub fn load(&self) -> Result<Word, WordError> {
        Word::from_bits(self.word().load(Ordering::SeqCst))
    }

    /// Changes the word from `expected` to `new`. Exactly one of two concurrent swaps from the same value wins.
    pub fn swap(&self, expected: Word, new: Word) -> SwapOutcome {
        let result = self.word().compare_exchange(
            expected.to_bits(),
            new.to_bits(),
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        match result.map_err(Word::from_bits) {
            Ok(_) => SwapOutcome::Won,
            Err(Ok(word)) => SwapOutcome::Lost(word),
            Err(Err(_)) => SwapOutcome::Meaningless,
        }
    }
}

impl AsFd for SharedWord {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedWord {
    fn drop(&mut self) {
        // SAFETY: this struct owns the mapping, and no reference into it outlives the struct.
        let unmapped = unsafe { munmap(self.page.cast(), SIZE.get()) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::ownership::Owner;

    use super::*;

    fn twin(word: &SharedWord) -> SharedWord {
        SharedWord::from_fd(word.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn both_processes_share_the_word_and_one_swap_wins() {
        let source = SharedWord::create().unwrap();
        let target = twin(&source);
        assert_eq!(target.load(), Ok(Word::INITIAL));
        let offered = Word::INITIAL.offered().unwrap();
        assert_eq!(source.swap(Word::INITIAL, offered), SwapOutcome::Won);
        assert_eq!(target.swap(offered, offered.taken().unwrap()), SwapOutcome::Won);
        let lost = source.swap(offered, offered.taken_back().unwrap());
        assert_eq!(lost, SwapOutcome::Lost(Word { epoch: 1, owner: Owner::Target }));
    }

    #[test]
    fn exactly_one_of_two_concurrent_swaps_wins() {
        let source = SharedWord::create().unwrap();
        let target = twin(&source);
        let mut word = Word::INITIAL;
        for _ in 0..200 {
            let offered = word.offered().unwrap();
            assert_eq!(source.swap(word, offered), SwapOutcome::Won);
            let barrier = std::sync::Barrier::new(2);
            let (taken, back) = std::thread::scope(|scope| {
                let taker = scope.spawn(|| {
                    barrier.wait();
                    target.swap(offered, offered.taken().unwrap())
                });
                barrier.wait();
                let back = source.swap(offered, offered.taken_back().unwrap());
                (taker.join().unwrap(), back)
            });
            assert_ne!(taken == SwapOutcome::Won, back == SwapOutcome::Won);
            let now = source.load().unwrap();
            assert_eq!(now.owner == Owner::Target, taken == SwapOutcome::Won);
            // The source owns it again in the next round.
            word = Word { owner: Owner::Source, ..now };
            source.word().store(word.to_bits(), Ordering::SeqCst);
        }
    }

    #[test]
    fn a_memfd_of_another_size_is_refused() {
        let error = SharedWord::from_fd(sealed_memfd::create("test", 8192).unwrap().into()).unwrap_err();
        assert_eq!(error.to_string(), "the ownership word's memfd is 8192 bytes long, expected 4096");
    }

    #[test]
    fn an_invalid_word_is_an_error() {
        let word = SharedWord::create().unwrap();
        word.word().store(0xff, Ordering::SeqCst);
        assert_eq!(word.load(), Err(WordError(0xff)));
        let outcome = word.swap(Word::INITIAL, Word::INITIAL.offered().unwrap());
        assert_eq!(outcome, SwapOutcome::Meaningless);
    }
}
