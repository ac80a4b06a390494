//! Wire types to domain types. Errors carry the field's path as the user wrote it (`head.sample_rate`), a fact
//! and a hint, and all of them are reported at once.

mod eval;
mod loss;

use crate::location::StoreUrl;
use crate::memory::size;
use crate::spec::{
    CHECKPOINTED_NETWORKS, CheckpointSpec, Choice, DataSpec, HeadInit, HeadSpec, JobSpec, ModelSpec,
    NETWORKS, TrainSpec,
};
use crate::v1;
use std::fmt;

/// One thing that is wrong with a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field: `head.sample_rate`.
    pub path: String,
    /// What is wrong: `1.5 is not in (0, 1]`.
    pub problem: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl fmt::Display for FieldViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.problem)
    }
}

/// Nearest of some candidates to a mistyped word, if one is near.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Collects violations while fields are read one by one.
#[derive(Default)]
struct Checker {
    violations: Vec<FieldViolation>,
}

impl Checker {
    fn fail(&mut self, path: &str, problem: impl Into<String>, hint: impl Into<String>) {
        self.violations.push(FieldViolation {
            path: path.into(),
            problem: problem.into(),
            hint: hint.into(),
        });
    }

    /// `value` if `valid`, else a violation; the value is returned all the same so that checking goes on.
    fn check<T: fmt::Display>(&mut self, path: &str, value: T, valid: bool, range: &str, hint: &str) -> T {
        if !valid {
            self.fail(path, format!("{value} is not {range}"), hint);
        }
        value
    }

    fn at_least_one<T: fmt::Display + PartialOrd + From<u8>>(&mut self, path: &str, value: T) -> T {
        let valid = value >= T::from(1);
        self.check(path, value, valid, "at least 1", "")
    }

    fn choice<T: Choice>(&mut self, path: &str, value: &Option<String>, default: T) -> T {
        let Some(name) = value else { return default };
        T::parse(name).unwrap_or_else(|| {
            let names: Vec<_> = T::ALL.iter().map(|(name, _)| *name).collect();
            let hint = nearest(name, names.iter().copied()).map(|near| format!("did you mean {near:?}?"));
            self.fail(
                path,
                format!("{name:?} is not one of {}", names.join(", ")),
                hint.unwrap_or_default(),
            );
            default
        })
    }

    /// An amount of memory; none if it is left out or 0.
    fn size(&mut self, path: &str, value: &Option<String>) -> Option<u64> {
        let text = value.as_deref().filter(|text| *text != NO_MEMORY)?;
        size::parse(text)
            .map_err(|problem| self.fail(path, problem, format!("\"{NO_MEMORY}\" is none")))
            .ok()
    }
}

/// How an amount of memory that is none is written.
const NO_MEMORY: &str = "0";

/// Validates a job and fills in its defaults.
///
/// # Errors
/// Every violation found, in the order of the sections.
pub fn job_spec(wire: &v1::JobSpec) -> Result<JobSpec, Vec<FieldViolation>> {
    let mut c = Checker::default();
    let output = wire.output.clone().unwrap_or_default();
    if output.is_empty() {
        c.fail(
            "output",
            "is missing",
            "the directory for model, log and checkpoints: output = \"work_dirs/my_job\"",
        );
    } else if output.contains('\0') || output.split('/').any(|part| part == "..") {
        c.fail("output", format!("{output:?} must not contain \"..\""), "");
    }
    let job = wire.job.clone().unwrap_or_default();
    let default_name = output
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or("job")
        .to_owned();
    let name = job.name.unwrap_or(default_name);
    if !output.is_empty() && !(1..=128).contains(&name.chars().count()) {
        c.fail(
            "job.name",
            format!("{} characters are not 1 to 128", name.chars().count()),
            "",
        );
    }
    let world_size = job.world_size.unwrap_or(1);
    let valid = (1..=4096).contains(&world_size);
    c.check(
        "job.world_size",
        world_size,
        valid,
        "in 1..=4096",
        "the number of ranks: one per GPU or CPU slot",
    );
    let min_world_size = job.min_world_size.unwrap_or(world_size);
    let valid = (1..=world_size.max(1)).contains(&min_world_size);
    c.check(
        "job.min_world_size",
        min_world_size,
        valid,
        "between 1 and job.world_size",
        "",
    );
    let max_world_size = job.max_world_size.unwrap_or(world_size);
    let valid = (world_size..=4096.max(world_size)).contains(&max_world_size);
    c.check(
        "job.max_world_size",
        max_world_size,
        valid,
        "between job.world_size and 4096",
        "",
    );
    let elastic = c.choice("job.elastic", &job.elastic, crate::spec::Elastic::Off);

    let model = model_spec(&mut c, wire.model.clone().unwrap_or_default());
    let head = head_spec(&mut c, wire.head.clone().unwrap_or_default());
    let data = data_spec(&mut c, wire.data.clone().unwrap_or_default(), &head);
    let train = train_spec(&mut c, wire.train.clone().unwrap_or_default());
    let eval = eval::eval(&mut c, wire.eval.clone().unwrap_or_default());
    let checkpoint = wire.checkpoint.clone().unwrap_or_default();
    let keep = c.at_least_one("checkpoint.keep", checkpoint.keep.unwrap_or(3));
    let every_seconds = checkpoint.every_seconds.unwrap_or(0.0);
    c.check(
        "checkpoint.every_seconds",
        every_seconds,
        every_seconds.is_finite() && every_seconds >= 0.0,
        "at least 0",
        "60 is a good start; the log of a job suggests an interval",
    );
    let rank_mttf_hours = checkpoint.rank_mttf_hours.unwrap_or(8000.0);
    c.check(
        "checkpoint.rank_mttf_hours",
        rank_mttf_hours,
        rank_mttf_hours.is_finite() && rank_mttf_hours > 0.0,
        "above 0",
        "",
    );
    let buddy_steps = checkpoint.buddy_steps.unwrap_or(100);
    c.check(
        "checkpoint.buddy_steps",
        buddy_steps,
        buddy_steps != 1,
        "0, or at least 2",
        "a copy takes a step to get to the other node",
    );
    let location = checkpoint.location.filter(|url| !url.is_empty());
    let location = location.and_then(|url| match StoreUrl::parse(&url) {
        Ok(url) => Some(url),
        Err((problem, hint)) => {
            c.fail("checkpoint.location", problem, hint);
            None
        }
    });

    if !c.violations.is_empty() {
        return Err(c.violations);
    }
    Ok(JobSpec {
        output,
        name,
        world_size,
        min_world_size,
        max_world_size,
        elastic,
        seed: job.seed.unwrap_or(2048),
        max_restarts: job.max_restarts.unwrap_or(10),
        model,
        head,
        data,
        train,
        eval,
        checkpoint: CheckpointSpec {
            every_steps: checkpoint.every_steps.filter(|steps| *steps > 0),
            every_seconds: Some(every_seconds).filter(|seconds| *seconds > 0.0),
            keep,
            rank_mttf_hours,
            buddy_steps: Some(buddy_steps).filter(|steps| *steps > 0),
            location,
        },
    })
}

fn model_spec(c: &mut Checker, model: v1::ModelSection) -> ModelSpec {
    let network = model.network.unwrap_or_default();
    if network.is_empty() {
        c.fail(
            "model.network",
            "is missing",
            format!("one of {}", NETWORKS.join(", ")),
        );
    } else if !NETWORKS.contains(&network.as_str()) {
        let hint = match nearest(&network, NETWORKS) {
            Some(near) => format!("did you mean {near:?}?"),
            None => "`arcface-worker networks` lists them".into(),
        };
        c.fail(
            "model.network",
            format!("{network:?} is not one of {}", NETWORKS.join(", ")),
            hint,
        );
    }
    let embedding_size = model.embedding_size.unwrap_or(512);
    let valid = (1..=4096).contains(&embedding_size);
    c.check(
        "model.embedding_size",
        embedding_size,
        valid,
        "in 1..=4096",
        "512 is the usual value",
    );
    let dropout = model.dropout.unwrap_or(0.0);
    c.check(
        "model.dropout",
        dropout,
        (0.0..1.0).contains(&dropout),
        "in [0, 1)",
        "",
    );
    ModelSpec {
        gradient_checkpointing: model
            .gradient_checkpointing
            .unwrap_or_else(|| CHECKPOINTED_NETWORKS.contains(&network.as_str())),
        network,
        embedding_size,
        dropout,
        init: model.init.filter(|path| !path.is_empty()),
        freeze_batch_norm: model.freeze_batch_norm.unwrap_or(false),
    }
}

fn head_spec(c: &mut Checker, head: v1::HeadSection) -> HeadSpec {
    if head.num_classes == Some(0) {
        c.fail(
            "head.num_classes",
            "0 is not at least 1",
            "leave it out to read it from the data set",
        );
    }
    let margin = match head.margin_list[..] {
        [] => [1.0, 0.5, 0.0],
        [m1, m2, m3] => [m1, m2, m3],
        _ => {
            let count = head.margin_list.len();
            c.fail(
                "head.margin_list",
                format!("{count} values are not 3"),
                "[m1, m2, m3]; ArcFace is [1.0, 0.5, 0.0]",
            );
            [1.0, 0.5, 0.0]
        }
    };
    if margin.iter().any(|m| !m.is_finite()) || margin[0] <= 0.0 {
        c.fail(
            "head.margin_list",
            "wants finite values and m1 > 0",
            "ArcFace is [1.0, 0.5, 0.0]",
        );
    }
    let scale = head.scale.unwrap_or(64.0);
    // exp(2 s) must stay finite in f32 for the sum of exponentials; s = 80 leaves room for 10^7 classes.
    c.check(
        "head.scale",
        scale,
        scale > 0.0 && scale <= 80.0,
        "in (0, 80]",
        "64 is the usual value",
    );
    let sample_rate = head.sample_rate.unwrap_or(1.0);
    c.check(
        "head.sample_rate",
        sample_rate,
        sample_rate > 0.0 && sample_rate <= 1.0,
        "in (0, 1]",
        "0.1 is the usual value",
    );
    let threshold = head.interclass_filtering_threshold.unwrap_or(0.0);
    c.check(
        "head.interclass_filtering_threshold",
        threshold,
        (0.0..=1.0).contains(&threshold),
        "in [0, 1]",
        "0 turns it off, 0.4 is the usual value",
    );
    let loss = loss::loss(c, &head);
    let init = head_init(c, &head);
    HeadSpec {
        loss,
        init,
        num_classes: head.num_classes,
        margin,
        scale,
        sample_rate,
        interclass_filtering_threshold: Some(threshold).filter(|t| *t > 0.0),
        margin_gradient: c.choice(
            "head.margin_gradient",
            &head.margin_gradient,
            crate::spec::MarginGradient::Reference,
        ),
        implementation: c.choice(
            "head.implementation",
            &head.implementation,
            crate::spec::HeadImplementation::Tiled,
        ),
    }
}

fn head_init(c: &mut Checker, head: &v1::HeadSection) -> Option<HeadInit> {
    let given = |path: &Option<String>| path.clone().filter(|path| !path.is_empty());
    let (init, class_list) = (given(&head.init), given(&head.class_list));
    if init.is_none() && class_list.is_some() {
        c.fail(
            "head.class_list",
            "does nothing without head.init",
            "head.init names the head whose classes the list takes",
        );
    }
    init.map(|path| HeadInit { path, class_list })
}

fn data_spec(c: &mut Checker, data: v1::DataSection, head: &HeadSpec) -> DataSpec {
    let rec = data.rec.unwrap_or_default();
    if rec.is_empty() || rec.contains('\0') {
        c.fail(
            "data.rec",
            "is missing",
            "a folder with train.rec and train.idx, an image folder, or \"synthetic\"",
        );
    }
    if data.num_image == Some(0) {
        c.fail(
            "data.num_image",
            "0 is not at least 1",
            "leave it out to read it from the data set",
        );
    }
    if rec == "synthetic" {
        if head.num_classes.is_none() {
            c.fail(
                "head.num_classes",
                "is missing",
                "synthetic data needs the number of identities to draw",
            );
        }
        if data.num_image.is_none() {
            c.fail(
                "data.num_image",
                "is missing",
                "synthetic data needs the number of images to draw",
            );
        }
    }
    let num_workers = data.num_workers.unwrap_or(2);
    c.check(
        "data.num_workers",
        num_workers,
        (1..=256).contains(&num_workers),
        "in 1..=256",
        "",
    );
    DataSpec {
        rec,
        num_image: data.num_image,
        num_workers,
        augment: c.choice("data.augment", &data.augment, crate::spec::Augment::Flip),
        cache: c.size("data.cache", &data.cache),
    }
}

fn train_spec(c: &mut Checker, train: v1::TrainSection) -> TrainSpec {
    let lr = train.lr.unwrap_or(0.1);
    c.check(
        "train.lr",
        lr,
        lr > 0.0 && lr.is_finite(),
        "a positive number",
        "0.1 is the usual value",
    );
    let momentum = train.momentum.unwrap_or(0.9);
    c.check(
        "train.momentum",
        momentum,
        (0.0..1.0).contains(&momentum),
        "in [0, 1)",
        "",
    );
    let weight_decay = train.weight_decay.unwrap_or(5e-4);
    let valid = weight_decay >= 0.0 && weight_decay.is_finite();
    c.check("train.weight_decay", weight_decay, valid, "at least 0", "");
    let clip = train.clip_grad_norm.unwrap_or(5.0);
    c.check(
        "train.clip_grad_norm",
        clip,
        clip >= 0.0 && clip.is_finite(),
        "at least 0",
        "0 turns clipping off",
    );
    TrainSpec {
        batch_size: c.at_least_one("train.batch_size", train.batch_size.unwrap_or(128)),
        num_epoch: c.at_least_one("train.num_epoch", train.num_epoch.unwrap_or(20)),
        warmup_epoch: train.warmup_epoch.unwrap_or(0),
        optimizer: c.choice("train.optimizer", &train.optimizer, crate::spec::Optimizer::Sgd),
        lr,
        momentum,
        weight_decay,
        gradient_acc: c.at_least_one("train.gradient_acc", train.gradient_acc.unwrap_or(1)),
        clip_grad_norm: Some(clip).filter(|clip| *clip > 0.0),
        precision: c.choice("train.precision", &train.precision, crate::spec::Precision::Fp32),
        frequent: c.at_least_one("train.frequent", train.frequent.unwrap_or(10)),
        max_steps: train.max_steps.filter(|steps| *steps > 0),
        accumulation: c.choice(
            "train.accumulation",
            &train.accumulation,
            crate::spec::Accumulation::Mean,
        ),
        on_nonfinite: c.choice(
            "train.on_nonfinite",
            &train.on_nonfinite,
            crate::spec::OnNonfinite::Stop,
        ),
        tensorboard: train.tensorboard.unwrap_or(true),
        gradient_compression: c.choice(
            "train.gradient_compression",
            &train.gradient_compression,
            crate::spec::GradientCompression::Off,
        ),
        cuda_graph: train.cuda_graph.unwrap_or(false),
    }
}

/// The inverse of [`job_spec`]: a wire job with every field set.
pub fn job_spec_to_wire(spec: &JobSpec) -> v1::JobSpec {
    v1::JobSpec {
        output: Some(spec.output.clone()),
        job: Some(v1::JobSection {
            name: Some(spec.name.clone()),
            world_size: Some(spec.world_size),
            min_world_size: Some(spec.min_world_size),
            max_world_size: Some(spec.max_world_size),
            elastic: Some(spec.elastic.as_str().into()),
            seed: Some(spec.seed),
            max_restarts: Some(spec.max_restarts),
        }),
        model: Some(v1::ModelSection {
            network: Some(spec.model.network.clone()),
            embedding_size: Some(spec.model.embedding_size),
            dropout: Some(spec.model.dropout),
            init: spec.model.init.clone(),
            freeze_batch_norm: Some(spec.model.freeze_batch_norm),
            gradient_checkpointing: Some(spec.model.gradient_checkpointing),
        }),
        head: Some(loss::to_wire(
            &spec.head.loss,
            v1::HeadSection {
                num_classes: spec.head.num_classes,
                margin_list: spec.head.margin.to_vec(),
                scale: Some(spec.head.scale),
                sample_rate: Some(spec.head.sample_rate),
                interclass_filtering_threshold: Some(spec.head.interclass_filtering_threshold.unwrap_or(0.0)),
                margin_gradient: Some(spec.head.margin_gradient.as_str().into()),
                implementation: Some(spec.head.implementation.as_str().into()),
                init: spec.head.init.as_ref().map(|init| init.path.clone()),
                class_list: spec.head.init.as_ref().and_then(|init| init.class_list.clone()),
                ..Default::default()
            },
        )),
        data: Some(v1::DataSection {
            rec: Some(spec.data.rec.clone()),
            num_image: spec.data.num_image,
            num_workers: Some(spec.data.num_workers),
            augment: Some(spec.data.augment.as_str().into()),
            cache: Some(spec.data.cache.map_or_else(|| NO_MEMORY.into(), size::exact)),
        }),
        train: Some(v1::TrainSection {
            batch_size: Some(spec.train.batch_size),
            num_epoch: Some(spec.train.num_epoch),
            warmup_epoch: Some(spec.train.warmup_epoch),
            optimizer: Some(spec.train.optimizer.as_str().into()),
            lr: Some(spec.train.lr),
            momentum: Some(spec.train.momentum),
            weight_decay: Some(spec.train.weight_decay),
            gradient_acc: Some(spec.train.gradient_acc),
            clip_grad_norm: Some(spec.train.clip_grad_norm.unwrap_or(0.0)),
            precision: Some(spec.train.precision.as_str().into()),
            frequent: Some(spec.train.frequent),
            max_steps: spec.train.max_steps,
            accumulation: Some(spec.train.accumulation.as_str().into()),
            on_nonfinite: Some(spec.train.on_nonfinite.as_str().into()),
            tensorboard: Some(spec.train.tensorboard),
            gradient_compression: Some(spec.train.gradient_compression.as_str().into()),
            cuda_graph: Some(spec.train.cuda_graph),
        }),
        eval: Some(eval::to_wire(&spec.eval)),
        checkpoint: Some(v1::CheckpointSection {
            every_steps: Some(spec.checkpoint.every_steps.unwrap_or(0)),
            keep: Some(spec.checkpoint.keep),
            every_seconds: Some(spec.checkpoint.every_seconds.unwrap_or(0.0)),
            rank_mttf_hours: Some(spec.checkpoint.rank_mttf_hours),
            buddy_steps: Some(spec.checkpoint.buddy_steps.unwrap_or(0)),
            location: spec.checkpoint.location.as_ref().map(ToString::to_string),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smallest() -> v1::JobSpec {
        v1::JobSpec {
            output: Some("work_dirs/x".into()),
            model: Some(v1::ModelSection {
                network: Some("r18".into()),
                ..Default::default()
            }),
            data: Some(v1::DataSection {
                rec: Some("/data".into()),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_job_survives_the_wire() {
        let spec = job_spec(&smallest()).expect("valid");
        assert_eq!(job_spec(&job_spec_to_wire(&spec)), Ok(spec));
    }

    #[test]
    fn a_location_survives_the_wire_and_a_bad_one_is_named() {
        let with = |url: &str| {
            let mut wire = smallest();
            wire.checkpoint.get_or_insert_default().location = Some(url.into());
            job_spec(&wire)
        };
        let spec = with("s3://faces/r50/").expect("valid");
        let shown = spec.checkpoint.location.as_ref().map(ToString::to_string);
        assert_eq!(shown.as_deref(), Some("s3://faces/r50"));
        assert_eq!(job_spec(&job_spec_to_wire(&spec)), Ok(spec));
        assert_eq!(with("").expect("valid").checkpoint.location, None);
        let violations = with("ftp://faces").expect_err("invalid");
        assert_eq!(
            violations[0].to_string(),
            "checkpoint.location: scheme \"ftp\" is not one of file, s3, gs, az"
        );
    }

    #[test]
    fn a_cache_survives_the_wire_and_a_bad_one_is_named() {
        let with = |cache: &str| {
            let mut wire = smallest();
            wire.data.get_or_insert_default().cache = Some(cache.into());
            job_spec(&wire)
        };
        for (cache, bytes) in [("4GiB", Some(4 << 30)), ("1.0000001kB", Some(1000)), ("0", None)] {
            let spec = with(cache).expect(cache);
            assert_eq!(spec.data.cache, bytes, "{cache}");
            assert_eq!(job_spec(&job_spec_to_wire(&spec)), Ok(spec), "{cache}");
        }
        for (cache, problem) in [
            ("", "\"\" is not a size; as in 80GiB"),
            ("4", "\"4\" has no unit; 4GiB or 4GB"),
            ("-1GiB", "\"-1GiB\" is not a size; as in 80GiB"),
            (
                "4 apples",
                "\"apples\" is not a unit; MiB, GiB, TiB, MB, GB or TB",
            ),
        ] {
            let violations = with(cache).expect_err(cache);
            assert_eq!(violations[0].to_string(), format!("data.cache: {problem}"));
        }
    }

    #[test]
    fn networks_that_need_it_are_checkpointed_unless_the_job_says_otherwise() {
        let checkpointing = |network: &str, wanted| {
            let mut wire = smallest();
            let model = wire.model.as_mut().expect("set above");
            model.network = Some(network.into());
            model.gradient_checkpointing = wanted;
            job_spec(&wire).expect("valid").model.gradient_checkpointing
        };
        for network in NETWORKS {
            let by_default = CHECKPOINTED_NETWORKS.contains(&network);
            assert_eq!(checkpointing(network, None), by_default, "{network}");
            assert!(checkpointing(network, Some(true)), "{network}");
            assert!(!checkpointing(network, Some(false)), "{network}");
        }
        assert!(CHECKPOINTED_NETWORKS.iter().all(|name| NETWORKS.contains(name)));
    }

    #[test]
    fn a_class_list_belongs_to_an_old_head() {
        let mut wire = smallest();
        let head = wire.head.get_or_insert_default();
        head.class_list = Some("classes.txt".into());
        let violations = job_spec(&wire).expect_err("invalid");
        assert_eq!(
            violations[0].to_string(),
            "head.class_list: does nothing without head.init"
        );
        wire.head.get_or_insert_default().init = Some("old".into());
        let spec = job_spec(&wire).expect("valid");
        let expected = HeadInit {
            path: "old".into(),
            class_list: Some("classes.txt".into()),
        };
        assert_eq!(spec.head.init, Some(expected));
        assert_eq!(job_spec(&job_spec_to_wire(&spec)), Ok(spec));
    }

    #[test]
    fn every_bad_field_is_named_at_once() {
        let mut wire = smallest();
        wire.head = Some(v1::HeadSection {
            sample_rate: Some(1.5),
            margin_list: vec![1.0],
            margin_gradient: Some("exactly".into()),
            ..Default::default()
        });
        wire.model.as_mut().unwrap().network = Some("r5O".into());
        wire.train = Some(v1::TrainSection {
            lr: Some(f64::NAN),
            batch_size: Some(0),
            ..Default::default()
        });
        let violations = job_spec(&wire).expect_err("invalid");
        let paths: Vec<_> = violations.iter().map(|v| v.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "model.network",
                "head.margin_list",
                "head.sample_rate",
                "head.margin_gradient",
                "train.lr",
                "train.batch_size"
            ]
        );
        assert_eq!(
            violations[2].to_string(),
            "head.sample_rate: 1.5 is not in (0, 1]"
        );
        assert_eq!(violations[3].hint, "did you mean \"exact\"?");
    }
}
