//! Images with the same bytes, in 16 bytes of memory an image: a hash says which may be equal, the bytes themselves
//! whether they are. Pure.

/// Hashes of images.
#[derive(Debug, Default)]
pub struct Hashes(Vec<(u64, u64)>);

/// A hash of an image's bytes.
pub fn hash(bytes: &[u8]) -> u64 {
    let digest = blake3::hash(bytes);
    let (first, _) = digest.as_bytes().split_first_chunk::<8>().expect("32 bytes");
    u64::from_le_bytes(*first)
}

impl Hashes {
    /// Adds an image.
    pub fn push(&mut self, image: u64, hash: u64) {
        self.0.push((hash, image));
    }

    /// (image, first image with the same bytes), in the order of the images; `same` compares two images' bytes.
    pub fn duplicates(mut self, same: impl Fn(u64, u64) -> bool) -> Vec<(u64, u64)> {
        self.0.sort_unstable();
        let mut found = Vec::new();
        for group in self.0.chunk_by(|a, b| a.0 == b.0) {
            // More than one only where different bytes have one hash.
            let mut originals: Vec<u64> = Vec::new();
            for &(_, image) in group {
                match originals.iter().find(|&&original| same(original, image)) {
                    Some(&original) => found.push((image, original)),
                    None => originals.push(image),
                }
            }
        }
        found.sort_unstable();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_hashes_alone_are_not_equal_images() {
        let mut hashes = Hashes::default();
        for (image, hash) in [(0, 5), (1, 5), (2, 9), (3, 5), (4, 5)] {
            hashes.push(image, hash);
        }
        let contents = ["a", "b", "c", "b", "a"];
        let same = |a: u64, b: u64| contents[a as usize] == contents[b as usize];
        assert_eq!(hashes.duplicates(same), [(3, 1), (4, 0)]);
        assert_ne!(hash(b"a"), hash(b"b"));
    }

    proptest! {
        #[test]
        fn what_is_left_is_every_image_once(contents in proptest::collection::vec(0u8..6, 0..40)) {
            let mut hashes = Hashes::default();
            for (image, content) in (0u64..).zip(&contents) {
                // Three contents share a hash.
                hashes.push(image, u64::from(content % 2));
            }
            let found = hashes.duplicates(|a, b| contents[a as usize] == contents[b as usize]);
            let expected: Vec<(u64, u64)> = (0u64..)
                .zip(&contents)
                .filter_map(|(image, content)| {
                    let first = contents.iter().position(|c| c == content)? as u64;
                    (first != image).then_some((image, first))
                })
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
