//! A world that shrinks and grows between checkpoints.

use super::*;

/// What training made, whatever the number of ranks: rank 0's backbone and the whole head.
fn model(ranks: &WorldState) -> Vec<(String, Tensor)> {
    let mut all: Vec<(String, Tensor)> = ranks[0]
        .iter()
        .filter(|(name, tensor)| name.starts_with("model.") && tensor.kind() == tch::Kind::Float)
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect();
    for part in ["weight", "momentum_buffer"] {
        let shards: Vec<Tensor> = ranks
            .iter()
            .flatten()
            .filter(|(name, _)| name == part)
            .map(|(_, tensor)| tensor.shallow_clone())
            .collect();
        assert_eq!(shards.len(), ranks.len(), "{part}");
        all.push((part.to_owned(), Tensor::cat(&shards, 0)));
    }
    all
}

/// Trains in pieces, each from the checkpoint of the one before: (end step, world size). Gives the world after the last, and the
/// positions of the samples that all ranks were given, in the order of the steps.
fn in_pieces(spec: &JobSpec, pieces: &[(u64, u32)]) -> (WorldState, Vec<u64>) {
    let scratch = tempfile::tempdir().unwrap();
    let mut manifest: Option<(std::path::PathBuf, CheckpointManifest)> = None;
    let mut seen = Vec::new();
    let mut start = 0;
    for (index, &(end, world_size)) in pieces.iter().enumerate() {
        let mut piece = spec.clone();
        piece.train.max_steps = Some(end);
        let ranks = on_ranks(&piece, world_size, |rank, trainer, job| {
            if let Some((dir, manifest)) = &manifest {
                let checkpoint = Checkpoint::open(dir, manifest.clone()).expect("a checkpoint");
                checkpoints::restore(trainer, &checkpoint, false).expect("restored");
            }
            let slices = (start..end).flat_map(|step| {
                let (epoch, epoch_step) = (
                    step / job.epochs.steps_per_epoch(),
                    step % job.epochs.steps_per_epoch(),
                );
                let slices = job
                    .epochs
                    .rank_slice(epoch_step, rank, world_size, piece.train.batch_size);
                slices
                    .into_iter()
                    .flatten()
                    .map(move |position| (epoch, position))
            });
            let positions: Vec<u64> = slices
                .map(|(epoch, position)| epoch * job.dataset.len() + job.epochs.position(epoch, position))
                .collect();
            losses(rank, trainer, job, start, scratch.path());
            let position = crate::rank::train::position(trainer, job, end);
            let snapshot = checkpoints::snapshot(trainer, position, job.num_classes);
            (state(trainer), snapshot, positions)
        });
        let dir = scratch.path().join(format!("piece-{index}"));
        let (mut states, mut snapshots) = (Vec::new(), Vec::new());
        for (state, snapshot, positions) in ranks {
            states.push(state);
            snapshots.push(snapshot);
            seen.extend(positions);
        }
        let written = write_checkpoint(&dir, snapshots);
        manifest = Some((dir, written));
        start = end;
        if index + 1 == pieces.len() {
            return (states, seen);
        }
    }
    unreachable!("there is a piece");
}

/// 4 ranks, 2 ranks, 3 ranks: each sample of each epoch is seen once, and the end is that of an unbroken run but for the order in
/// which sums over ranks are rounded (1e-6 a step, which ten steps of training amplify).
#[test]
fn four_then_two_then_three_ranks_learn_what_four_do() {
    let spec = job(4, |wire| wire.train.get_or_insert_default().num_epoch = Some(2));
    let (changed, mut seen) = in_pieces(&spec, &[(3, 4), (7, 2), (10, 3)]);
    let (unbroken, mut seen_unbroken) = in_pieces(&spec, &[(10, 4)]);
    for (a, b) in model(&changed).iter().zip(&model(&unbroken)) {
        assert_eq!((&a.0, a.1.size()), (&b.0, b.1.size()));
        let difference = (&a.1 - &b.1).norm().double_value(&[]) / b.1.norm().double_value(&[]).max(1e-6);
        assert!(difference < 1e-3, "{}: {difference}", a.0);
    }
    seen.sort_unstable();
    seen_unbroken.sort_unstable();
    assert_eq!(seen, seen_unbroken);
    assert_eq!(
        seen,
        (0..80).collect::<Vec<u64>>(),
        "40 images, two epochs, each once"
    );
}
