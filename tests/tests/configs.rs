//! Every file in `configs/` is a valid job, and the recipes of the reference keep its values, name by name.
//! `tests/formats/reference_recipes.json` holds those values: the reference's files with its defaults merged in,
//! `batch_size` per rank, and the number of ranks that the recipe's name says (8 if it says none).

use anyhow::{Context, Result, ensure};
use arcface_coordinator::{
    plan::{PlanJob, PlanNode, plan},
    recipe::{self, Source},
    spec::{self, JobFile, SpecError},
};
use arcface_proto::{
    convert,
    spec::{Augment, Choice, JobSpec, LossName},
    v1,
};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, path::Path};

/// Where a recipe means something that its number does not say; each file has a comment beside the value.
/// (recipe, key, the reference's value, ours)
const REINTERPRETED: [(&str, &str, &str, &str); 5] = [
    // Below one class a shard: only the classes of the batch.
    ("wf42m_pfc0008_32gpu_r100", "sample_rate", "0.0", "0.000001"),
    // "No warm-up" is written 0.
    ("3millions", "warmup_epoch", "-1", "0"),
    ("3millions_pfc", "warmup_epoch", "-1", "0"),
    ("3millions_mp", "warmup_epoch", "-1", "0"),
    // JPEGs are decoded on the CPU.
    ("wf42m_pfc02_vit_h", "dali", "true", "false"),
];

/// A job file through the loader of `submit`.
fn load(path: &Path) -> Result<JobFile> {
    spec::parse(&fs::read_to_string(path)?, &[]).map_err(|error| match error {
        SpecError::Fields(violations) => {
            let list: Vec<_> = violations.iter().map(ToString::to_string).collect();
            anyhow::anyhow!(list.join("; "))
        }
        other => other.into(),
    })
}

/// The reference's values by recipe.
fn recipes() -> Result<BTreeMap<String, Map<String, Value>>> {
    let path = arcface_tests::workspace().join("tests/formats/reference_recipes.json");
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

fn load_all() -> Result<BTreeMap<String, JobSpec>> {
    load_folder("configs")
}

/// The jobs of a folder by name, without those of folders in it.
fn load_folder(folder: &str) -> Result<BTreeMap<String, JobSpec>> {
    let folder = arcface_tests::workspace().join(folder);
    let mut jobs = BTreeMap::new();
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        if path.is_dir() {
            continue;
        }
        ensure!(
            path.extension().is_some_and(|e| e == "toml"),
            "{} is not a job file",
            path.display()
        );
        let job = load(&path)
            .with_context(|| format!("load {}", path.display()))?
            .spec;
        let stem = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        ensure!(
            job.name == stem,
            "{}: job.name is {:?}, the file's name was expected",
            path.display(),
            job.name
        );
        jobs.insert(stem, job);
    }
    Ok(jobs)
}

/// The job's values under the reference's names and in its units.
fn in_reference_terms(job: &JobSpec) -> Map<String, Value> {
    // The reference's default output has no other name.
    let default_output = format!("work_dirs/{}", job.name);
    let output = Some(&job.output).filter(|output| **output != default_output);
    let value = serde_json::json!({
        "dali": false,
        "dali_aug": job.data.augment == Augment::Dali,
        // A job resumes from its own checkpoints, which hold all states, and from nothing else.
        "resume": false,
        "save_all_states": false,
        "output": output,
        "batch_size": job.train.batch_size,
        "embedding_size": job.model.embedding_size,
        "fp16": job.train.precision.as_str() == "fp16",
        "frequent": job.train.frequent,
        "gradient_acc": job.train.gradient_acc,
        "interclass_filtering_threshold": job.head.interclass_filtering_threshold.unwrap_or(0.0),
        "lr": job.train.lr,
        "margin_list": job.head.margin,
        "momentum": job.train.momentum,
        "network": job.model.network,
        "num_classes": job.head.num_classes,
        "num_epoch": job.train.num_epoch,
        "num_image": job.data.num_image,
        "num_workers": job.data.num_workers,
        "optimizer": job.train.optimizer.as_str(),
        "rec": job.data.rec,
        "sample_rate": job.head.sample_rate,
        "seed": job.seed,
        "val_targets": job.eval.val_targets,
        "verbose": job.eval.every_steps,
        "warmup_epoch": job.train.warmup_epoch,
        "weight_decay": job.train.weight_decay,
        "world_size": job.world_size,
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Numbers compare by value: the reference writes 0 where we read 0.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => a == b,
        },
    }
}

#[test]
fn every_config_is_a_valid_job_and_named_like_its_file() -> Result<()> {
    let jobs = load_all()?;
    ensure!(jobs.contains_key("demo_cpu"), "configs/demo_cpu.toml is missing");
    Ok(())
}

/// `configs/losses` has an example of every loss that the reference does not have, with its paper's numbers.
#[test]
fn every_loss_has_an_example_with_its_defaults() -> Result<()> {
    let jobs = load_folder("configs/losses")?;
    for (name, loss) in LossName::ALL
        .iter()
        .filter(|(_, loss)| *loss != LossName::ArcFace)
    {
        let job = jobs.values().find(|job| job.head.loss.name() == *loss);
        let job = job.with_context(|| format!("configs/losses has no example of {name}"))?;
        let mut wire = convert::job_spec_to_wire(job);
        if let Some(head) = &mut wire.head {
            (head.adaface, head.magface) = (None, None);
            (head.curricularface, head.subcenter) = (None, None);
        }
        let bare = convert::job_spec(&wire).map_err(|violations| anyhow::anyhow!("{violations:?}"))?;
        ensure!(bare == *job, "{}: not the numbers of the paper", job.name);
    }
    Ok(())
}

/// What `submit --dry-run` prints can be submitted, the sections inside sections too.
#[test]
fn a_job_with_every_default_written_out_is_a_job_file() -> Result<()> {
    for job in load_all()?
        .values()
        .chain(load_folder("configs/losses")?.values())
    {
        let text = toml::to_string(&convert::job_spec_to_wire(job))?;
        let wire: v1::JobSpec = toml::from_str(&text).with_context(|| format!("{}: {text}", job.name))?;
        let read = convert::job_spec(&wire).map_err(|violations| anyhow::anyhow!("{violations:?}"))?;
        ensure!(read == *job, "{}: {text}", job.name);
    }
    Ok(())
}

#[test]
fn recipes_keep_the_references_values() -> Result<()> {
    let recipes = recipes()?;
    let jobs = load_all()?;
    let mut wrong = Vec::new();
    for (name, recipe) in &recipes {
        let Some(job) = jobs.get(name) else {
            wrong.push(format!("{name}: configs/{name}.toml is missing"));
            continue;
        };
        let ours = in_reference_terms(job);
        for key in recipe
            .keys()
            .chain(ours.keys().filter(|key| !recipe.contains_key(*key)))
        {
            let (theirs, ours) = (recipe.get(key), ours.get(key));
            let (Some(theirs), Some(ours)) = (theirs, ours) else {
                wrong.push(format!(
                    "{name}: {key} is not on both sides: {theirs:?}, {ours:?}"
                ));
                continue;
            };
            let reinterpreted = REINTERPRETED
                .iter()
                .find(|(recipe, k, ..)| recipe == name && k == key);
            let right = match reinterpreted {
                Some((_, _, from, to)) => {
                    same(theirs, &serde_json::from_str(from)?) && same(ours, &serde_json::from_str(to)?)
                }
                None => same(theirs, ours),
            };
            if !right {
                wrong.push(format!("{name}: {key} is {ours}, the reference has {theirs}"));
            }
        }
    }
    for name in jobs
        .keys()
        .filter(|name| *name != "demo_cpu" && !recipes.contains_key(*name))
    {
        wrong.push(format!("{name}: not a recipe of the reference"));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(recipes.len() >= 49, "only {} recipes", recipes.len());
    println!("{} recipes, {} job files", recipes.len(), jobs.len());
    Ok(())
}

/// A value as Python writes it.
fn in_python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(in_python).collect();
            format!("[{}]", values.join(", "))
        }
        // Numbers and strings are written as in JSON.
        other => other.to_string(),
    }
}

/// The recipes of `configs/` are what `convert-config` makes of the reference's files, key for key.
#[test]
fn a_converted_recipe_is_the_config_of_its_name() -> Result<()> {
    for (name, recipe) in &recipes()? {
        let mut text = "from easydict import EasyDict as edict\n\nconfig = edict()\n".to_owned();
        // The number of ranks is in the name.
        for (key, value) in recipe.iter().filter(|(key, _)| *key != "world_size") {
            text.push_str(&format!("config.{key} = {}  # as it is\n", in_python(value)));
        }
        let source = Source {
            name: &format!("{name}.py"),
            text: &text,
        };
        let options = recipe::Options {
            job: name.clone(),
            gpus: None,
        };
        let converted = recipe::convert(source, None, &options)
            .map_err(|complaints| anyhow::anyhow!("{name}: {complaints:?}"))?;
        let path = arcface_tests::workspace().join(format!("configs/{name}.toml"));
        let config = load(&path)?;
        ensure!(
            converted.job.wire == config.wire,
            "{name}: converted to\n{}",
            converted.text
        );
        for (key, ..) in REINTERPRETED
            .iter()
            .filter(|(recipe, ..)| recipe == name)
            .map(|(_, key, ..)| (key,))
        {
            let named = |remark: &recipe::Remark| remark.text.starts_with(&format!("config.{key} "));
            ensure!(
                converted.remarks.iter().any(named),
                "{name}: nothing is said about {key}"
            );
        }
    }
    Ok(())
}

/// Nodes of eight slots, as many as a job needs, hold it; with one slot less it waits and says so.
#[test]
fn every_config_is_placed_on_nodes_that_are_enough() -> Result<()> {
    for job in load_all()?.values() {
        let world = job.world_size;
        let node = |index: u32, slots: u32| -> Result<PlanNode> {
            Ok(PlanNode {
                id: format!("node-{index}").parse()?,
                slots,
                free: slots,
                kept: 0,
                usable: true,
            })
        };
        let nodes = (0..world.div_ceil(8))
            .map(|index| node(index, 8.min(world - 8 * index)))
            .collect::<Result<Vec<_>>>()?;
        let wish = PlanJob {
            least: job.min_world_size,
            most: job.max_world_size,
        };
        let placement = plan(&nodes, wish, &[]).map_err(|why| anyhow::anyhow!("{}: {why}", job.name))?;
        ensure!(
            placement.len() == world as usize,
            "{}: {} ranks",
            job.name,
            placement.len()
        );
        let mut fewer = nodes;
        fewer[0].free -= 1;
        ensure!(
            plan(&fewer, wish, &[]).is_err(),
            "{}: planned on {} slots",
            job.name,
            world - 1
        );
    }
    Ok(())
}
