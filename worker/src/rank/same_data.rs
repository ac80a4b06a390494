//! Whether all ranks see the same training data. Every rank reads its own share of one order of samples: with other data, or more of
//! them, a node would train on other images without a word, or leave the others in the middle of an epoch.

use super::failure::RankFailure;
use crate::collective::Collective;
use crate::data::{Dataset, Image};
use arcface_proto::v1::CheckpointManifest;
use tch::Tensor;

/// Images that are looked at, evenly over the set: enough to find another set, few enough to cost nothing.
const LOOKED_AT: u64 = 64;

/// What a rank knows of its data: images, classes, and a digest of some of them.
fn fingerprint(dataset: &dyn Dataset) -> [i64; 3] {
    let images = dataset.len();
    let mut hasher = blake3::Hasher::new();
    for k in 0..images.min(LOOKED_AT) {
        // No overflow below 2^57 images.
        let index = match images > LOOKED_AT {
            true => k * images / LOOKED_AT,
            false => k,
        };
        // A damaged one fails when it is trained on, with its name.
        let Ok(record) = dataset.record(index) else {
            continue;
        };
        hasher.update(&record.label.to_le_bytes());
        match &record.image {
            Image::Encoded(bytes, _) => hasher.update(bytes),
            Image::Pixels(pixels) => hasher.update(pixels.as_slice()),
        };
    }
    let mut digest = [0; 8];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    [
        images.cast_signed(),
        dataset.num_classes().into(),
        i64::from_le_bytes(digest),
    ]
}

/// Compares the data of all ranks.
///
/// # Errors
/// Permanent, with both numbers, if they differ; or if a peer is lost.
pub fn check_same_data(dataset: &dyn Dataset, comm: &mut dyn Collective) -> Result<(), RankFailure> {
    let all = comm.all_gather(&Tensor::from_slice(&fingerprint(dataset)))?;
    let of = |rank: i64| [0, 1, 2].map(|column| all.int64_value(&[3 * rank + column]));
    let [images, classes, _] = of(0);
    for rank in 1..i64::from(comm.world_size()) {
        let own = of(rank);
        if own == of(0) {
            continue;
        }
        let found = match own[..2] == [images, classes] {
            true => "as many images and classes, but other ones".to_owned(),
            false => format!(
                "{} images of {} classes, that one {images} of {classes}",
                own[0], own[1]
            ),
        };
        return Err(RankFailure::permanent(format!(
            "rank {rank} has other training data than rank 0: {found}"
        ))
        .hint("data.rec is read on every node: the same files belong there"));
    }
    Ok(())
}

/// Compares the data with those that a checkpoint was written with: more or fewer images are other epochs, and a learning rate
/// that jumps.
///
/// # Errors
/// With both numbers, if they differ. Data that are not all there may come back: another try is worth it.
pub fn check_as_before(dataset: &dyn Dataset, manifest: &CheckpointManifest) -> Result<(), RankFailure> {
    let (images, classes) = (dataset.len(), dataset.num_classes());
    let before = manifest.num_image.unwrap_or(images);
    if (images, classes) == (before, manifest.num_classes) {
        return Ok(());
    }
    Err(RankFailure::transient(format!(
        "the training data have {images} images of {classes} classes, and had {before} of {} when the checkpoint of step {} was written",
        manifest.num_classes, manifest.step
    ))
    .hint("put the data back as they were; to train on others, submit a new job, whose model.init may be this one's model"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::local;
    use crate::data::synthetic::SyntheticFaces;
    use std::time::Duration;

    /// What each rank of a world finds, with these sets.
    fn compare(sets: [SyntheticFaces; 3]) -> Vec<Result<(), RankFailure>> {
        let world = local::world(3, Duration::from_secs(20)).expect("a world on loopback");
        std::thread::scope(|scope| {
            let ranks: Vec<_> = world
                .into_iter()
                .zip(&sets)
                .map(|(mut comm, set)| scope.spawn(move || check_same_data(set, &mut comm)))
                .collect();
            ranks
                .into_iter()
                .map(|rank| rank.join().expect("a rank"))
                .collect()
        })
    }

    #[test]
    fn data_that_changed_since_the_checkpoint_are_refused() {
        let set = SyntheticFaces::new(1, 7, 200);
        let manifest = |num_image, num_classes| CheckpointManifest {
            step: 40,
            num_image,
            num_classes,
            ..Default::default()
        };
        // Older versions did not say how many images there were.
        for same in [manifest(Some(200), 7), manifest(None, 7)] {
            check_as_before(&set, &same).expect("the same data");
        }
        let refused = |manifest| check_as_before(&set, &manifest).expect_err("other data");
        let failure = refused(manifest(Some(201), 7));
        assert!(!failure.permanent);
        assert_eq!(
            failure.message,
            "the training data have 200 images of 7 classes, and had 201 of 7 when the checkpoint of step 40 was written"
        );
        refused(manifest(None, 8));
    }

    #[test]
    fn other_data_on_one_node_is_named_on_all() {
        let set = |seed, classes, images| SyntheticFaces::new(seed, classes, images);
        assert!(
            compare([(); 3].map(|()| set(1, 7, 200)))
                .iter()
                .all(Result::is_ok)
        );
        let found = |other| {
            let results = compare([set(1, 7, 200), set(1, 7, 200), other]);
            let told: Vec<String> = results
                .into_iter()
                .map(|result| {
                    let failure = result.expect_err("they differ");
                    assert!(failure.permanent);
                    failure.message
                })
                .collect();
            assert!(told.iter().all(|line| *line == told[0]), "{told:?}");
            told[0].clone()
        };
        assert_eq!(
            found(set(1, 7, 100)),
            "rank 2 has other training data than rank 0: 100 images of 7 classes, that one 200 of 7"
        );
        assert_eq!(
            found(set(2, 7, 200)),
            "rank 2 has other training data than rank 0: as many images and classes, but other ones"
        );
    }
}
