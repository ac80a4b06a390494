//! BLAKE3 digests, computed on a thread beside the one that moves the bytes. Knows no file.

use std::{
    io::{self, Read},
    sync::{Arc, mpsc},
    thread,
};

use super::CHUNK;

/// Chunks that wait for the digest, at most.
const WAITING: usize = 1;

/// Runs `work`, which gives chunks away in the order in which they count, and computes their digest meanwhile.
pub(super) fn beside<C: AsRef<[u8]> + Send, R>(work: impl FnOnce(&mut dyn FnMut(C)) -> R) -> (R, String) {
    thread::scope(|scope| {
        let (give, take) = mpsc::sync_channel::<C>(WAITING);
        let hasher = scope.spawn(move || {
            let mut hasher = blake3::Hasher::new();
            for chunk in take {
                hasher.update(chunk.as_ref());
            }
            hasher.finalize().to_hex().to_string()
        });
        // The other end goes only if that thread panics, which `join` tells.
        let result = work(&mut |chunk| drop(give.send(chunk)));
        drop(give);
        (result, hasher.join().expect("hashing does not panic"))
    })
}

/// Buffers that are filled one after the other while those before are hashed: with [`WAITING`] and one in hand, three are enough for
/// none to be copied.
#[derive(Default)]
pub(super) struct Ring {
    buffers: [Arc<Vec<u8>>; WAITING + 2],
    next: usize,
}

impl Ring {
    /// The next buffer, `length` bytes long when `fill` gets it, once that has filled it.
    pub fn fill<E>(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<Chunk, E> {
        let buffer = &mut self.buffers[self.next];
        let bytes = Arc::make_mut(buffer);
        bytes.resize(length, 0);
        fill(bytes)?;
        let chunk = Chunk(buffer.clone());
        self.next = (self.next + 1) % self.buffers.len();
        Ok(chunk)
    }
}

/// Bytes that two threads read.
#[derive(Clone)]
pub(super) struct Chunk(Arc<Vec<u8>>);

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The digest of everything that `from` still has.
pub(super) fn of_all(from: &mut dyn Read) -> io::Result<String> {
    let (read, digest) = beside(|give| {
        let mut ring = Ring::default();
        loop {
            let chunk = ring.fill(CHUNK, |bytes| {
                bytes.clear();
                from.take(CHUNK as u64).read_to_end(bytes).map(drop)
            })?;
            match chunk.as_ref().is_empty() {
                true => return io::Result::Ok(()),
                false => give(chunk),
            }
        }
    });
    read.map(|()| digest)
}

/// Fills `bytes` from `from`; their digest.
pub(super) fn filling(bytes: &mut [u8], from: &mut dyn Read) -> io::Result<String> {
    let (read, digest) = beside(|give| {
        for chunk in bytes.chunks_mut(CHUNK) {
            from.read_exact(chunk)?;
            give(&*chunk);
        }
        io::Result::Ok(())
    });
    read.map(|()| digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_whole() {
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * i % 251) as u8).collect();
            let expected = blake3::hash(&bytes).to_hex().to_string();
            assert_eq!(of_all(&mut &bytes[..]).expect("read"), expected, "{length}");
            let mut filled = vec![0; length];
            assert_eq!(
                filling(&mut filled, &mut &bytes[..]).expect("read"),
                expected,
                "{length}"
            );
            assert!(filled == bytes, "{length}");
        }
        assert!(filling(&mut [0; 5], &mut &[1u8; 4][..]).is_err(), "there is less");
    }

    #[test]
    fn buffers_that_are_still_read_keep_their_bytes() {
        let mut ring = Ring::default();
        let chunks: Vec<Chunk> = (0..7u8)
            .map(|number| {
                let filled = ring.fill(3, |bytes| {
                    bytes.fill(number);
                    Ok::<(), ()>(())
                });
                filled.expect("filled")
            })
            .collect();
        for (number, chunk) in (0..7u8).zip(&chunks) {
            assert_eq!(chunk.as_ref(), [number; 3]);
        }
    }
}
