//! Fine-tuning: class weights that come from an earlier head, at any world size, from every form of it.

use super::*;
use crate::checkpoint::write;
use crate::export::{pytorch, safetensors};
use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use tch::{Device, Kind};

const OLD_CLASSES: i64 = 10;
const SIZE: i64 = 16;
/// Ten classes become twelve: three are new, and class 8 is retired.
const LIST: &str = "3 n03\nnew\n0 n00\n9\n-\n1\n2\n4\n5\n6\n7\nnew\n";
const FROM: [i64; 12] = [3, -1, 0, 9, -1, 1, 2, 4, 5, 6, 7, -1];

/// A job of `classes` identities that starts from `init`.
fn tuned(world_size: u32, classes: u32, change: impl FnOnce(&mut v1::HeadSection)) -> JobSpec {
    job(world_size, |wire| {
        let head = wire.head.get_or_insert_default();
        head.num_classes = Some(classes);
        change(head);
        wire.data.get_or_insert_default().num_image = Some(4 * u64::from(classes));
    })
}

fn text(path: &Path) -> Option<String> {
    Some(path.display().to_string())
}

/// The head's tensors over all ranks before the first step.
fn heads(spec: &JobSpec, world_size: u32) -> HashMap<String, Tensor> {
    let shards = on_ranks(spec, world_size, |_, trainer, _| trainer.head.state());
    let names: Vec<String> = shards[0].iter().map(|(name, _)| name.clone()).collect();
    let joined = names.into_iter().enumerate().map(|(i, name)| {
        let parts: Vec<&Tensor> = shards.iter().map(|shard| &shard[i].1).collect();
        (name, Tensor::cat(&parts, 0))
    });
    joined.collect()
}

/// A checkpoint of a trained head in `dir`, and its class weights.
fn old_checkpoint(dir: &Path, world_size: u32, change: impl FnOnce(&mut v1::JobSpec)) -> Tensor {
    let scratch = tempfile::tempdir().unwrap();
    let spec = job(world_size, change);
    let snapshots = on_ranks(&spec, world_size, |rank, trainer, job| {
        losses(rank, trainer, job, 0, scratch.path());
        let position = crate::checkpoint::TrainState {
            step: 5,
            epoch: 1,
            epoch_samples: 0,
            scaler: None,
            num_image: None,
        };
        checkpoints::snapshot(trainer, position, job.num_classes)
    });
    let weights: Vec<Tensor> = snapshots
        .iter()
        .map(|snapshot| {
            let (_, tensors) = snapshot.parts.last().expect("the head");
            let weight = tensors.iter().find(|(name, _)| name == "weight");
            weight.expect("class weights").1.shallow_clone()
        })
        .collect();
    let manifest = write_checkpoint(dir, snapshots);
    write::write_manifest(dir, &manifest).expect("written");
    Tensor::cat(&weights, 0)
}

/// What the twelve classes must start as.
fn expected(old: &Tensor, fresh: &Tensor) -> Tensor {
    let rows = (0i64..).zip(FROM).map(|(class, from)| match from {
        -1 => fresh.get(class),
        from => old.get(from).to_kind(Kind::Float),
    });
    Tensor::stack(&rows.collect::<Vec<_>>(), 0)
}

#[test]
fn classes_start_as_the_list_says_at_any_world_size() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let trained = old_checkpoint(&at("c"), 2, |_| {});
    fs::write(at("classes.txt"), LIST).unwrap();
    safetensors::write(&at("one.safetensors"), [("weight", &trained)]).unwrap();
    fs::create_dir(at("reference")).unwrap();
    for (gpu, rows) in trained.split(6, 0).iter().enumerate() {
        let path = at("reference").join(format!("softmax_fc_gpu_{gpu}.pt"));
        pytorch::write(&path, [("weight", rows)]).unwrap();
    }
    let fresh = &heads(&tuned(1, 12, |_| {}), 1)["weight"];
    for (world_size, init, implementation) in [
        (1, "c", "tiled"),
        (3, "c", "tiled"),
        (4, "c", "plain"),
        (2, "one.safetensors", "plain"),
        (3, "one.safetensors", "tiled"),
        (1, "reference", "plain"),
        (4, "reference", "tiled"),
    ] {
        let spec = tuned(world_size, 12, |head| {
            head.init = text(&at(init));
            head.class_list = text(&at("classes.txt"));
            head.implementation = Some(implementation.into());
        });
        let head = heads(&spec, world_size);
        assert_eq!(
            head["weight"],
            expected(&trained, fresh),
            "{init} at {world_size} ranks"
        );
        let momentum = head.keys().find(|name| name.contains("momentum"));
        let momentum = &head[momentum.expect("momentum")];
        assert_eq!(momentum.abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn without_a_list_the_classes_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.safetensors");
    let old = Tensor::randn([OLD_CLASSES, SIZE], (Kind::Float, Device::Cpu));
    // Other floats are converted.
    safetensors::write(&path, [("weight", &old.to_kind(Kind::BFloat16))]).unwrap();
    let spec = tuned(2, 10, |head| head.init = text(&path));
    let started = &heads(&spec, 2)["weight"];
    assert_eq!(started, &old.to_kind(Kind::BFloat16).to_kind(Kind::Float));
    // And it trains from there.
    let curve = on_ranks(&spec, 2, |rank, trainer, job| {
        losses(rank, trainer, job, 0, dir.path())
    });
    assert!(curve[0].iter().all(|loss| loss.is_finite()), "{curve:?}");
}

#[test]
fn the_centres_of_a_class_stay_together() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let trained = old_checkpoint(&at("c"), 1, |wire| {
        wire.head.get_or_insert_default().loss = Some("subcenter".into());
    });
    assert_eq!(trained.size(), [OLD_CLASSES, 3, SIZE]);
    fs::write(at("classes.txt"), LIST).unwrap();
    let with_loss = |loss: &str, list: bool| {
        tuned(2, 12, |head| {
            head.loss = Some(loss.into());
            if list {
                head.init = text(&at("c"));
                head.class_list = text(&at("classes.txt"));
            }
        })
    };
    let fresh = &heads(&with_loss("subcenter", false), 2)["weight"];
    assert_eq!(
        heads(&with_loss("subcenter", true), 2)["weight"],
        expected(&trained, fresh)
    );
    let refused = refusal(&with_loss("arcface", true));
    assert!(
        refused
            .contains("a class has 3 centres of 16 numbers of kind Float there, and 16 numbers in this job"),
        "{refused}"
    );
}

/// Why a job does not start.
fn refusal(spec: &JobSpec) -> String {
    let comm = local::world(1, OPERATION).expect("a world").swap_remove(0);
    let failure = Prepared::open(spec.clone(), &[], Placement::cpu())
        .and_then(|prepared| prepared.into_trainer(Box::new(comm)).map(drop))
        .expect_err("refused");
    assert!(failure.permanent, "{failure:?}");
    assert_eq!(failure.message.lines().count(), 1, "{failure:?}");
    failure.message
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let write = |name: &str, weight: Tensor| {
        safetensors::write(&at(name), [("weight", &weight)]).unwrap();
    };
    let weight = || Tensor::zeros([OLD_CLASSES, SIZE], (Kind::Float, Device::Cpu));
    write("good", weight());
    write("narrow", weight().narrow(1, 0, 8));
    write("whole", weight().to_kind(Kind::Int64));
    write("flat", weight().view([-1]).get(0));
    let bad = weight();
    let _ = bad.get(7).fill_(f64::NAN);
    write("nan", bad);
    safetensors::write(&at("other"), [("bias", &weight())]).unwrap();
    fs::write(at("junk"), b"junk").unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("gap")).unwrap();
    pytorch::write(&at("gap/softmax_fc_gpu_1.pt"), [("weight", &weight())]).unwrap();
    fs::write(at("list"), "0\n12\n").unwrap();
    fs::write(at("latin"), b"0\n\xff\n").unwrap();
    let damaged = at("damaged");
    let _ = old_checkpoint(&damaged, 2, |_| {});
    let part = damaged.join("head-5-10.safetensors");
    let mut bytes = fs::read(&part).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&part, bytes).unwrap();
    type Paths<'a> = (PathBuf, Option<PathBuf>);
    let cases: [(Paths, &str); 12] = [
        ((at("nowhere"), None), "no such file"),
        (
            (at("narrow"), None),
            "a class has 8 numbers of kind Float there, and 16 numbers",
        ),
        ((at("whole"), None), "its kind is I64, expected a float"),
        ((at("flat"), None), "is not a row a class"),
        ((at("nan"), None), "the weights for class 7 are not finite"),
        ((at("other"), None), "no tensor weight"),
        ((at("junk"), None), "not a PyTorch archive"),
        ((at("empty"), None), "no head in it"),
        (
            (at("gap"), None),
            "softmax_fc_gpu_0.pt: no such file, but there are later ones",
        ),
        ((damaged, None), "head-5-10.safetensors: contents changed"),
        (
            (at("good"), Some(at("list"))),
            "line 2: class 12 is not one of the old head's 0..10",
        ),
        ((at("good"), Some(at("latin"))), "it is not UTF-8"),
    ];
    for ((init, list), words) in cases {
        let spec = tuned(1, 10, |head| {
            head.init = text(&init);
            head.class_list = list.as_deref().and_then(text);
        });
        let refused = refusal(&spec);
        assert!(refused.contains(words), "{refused}");
    }
    let spec = tuned(1, 11, |head| head.init = text(&at("good")));
    assert_eq!(
        refusal(&spec),
        "head.init: the old head has 10 classes, the data set 11"
    );
}
