//! The table with which large-scale trainers of face recognition are compared: samples a second and memory of each GPU, for
//! millions of identities over eight GPUs, by way of training. One process at a time runs the share that one GPU of that world
//! has: its rows of the batch, its shard of the classes, the gathered batch. What GPUs would send each other is not part of it.

use super::comparison::in_a_process;
use crate::tools::place::PlaceArgs;
use arcface_proto::failure::{ExitCode, Failure};
use serde_json::{Value, json};

/// Arguments of `bench table`.
#[derive(clap::Args, Debug)]
pub struct TableArgs {
    /// GPUs of the world whose share is run.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    world: u32,
    /// Part of each setting's classes and batch, in (0, 1]: smaller ones try the table on a small machine.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// The smallest network instead of each setting's.
    #[arg(long)]
    tiny: bool,
    #[command(flatten)]
    place: PlaceArgs,
}

impl TableArgs {
    /// What computes.
    pub(super) fn device(&self) -> &'static str {
        self.place.name()
    }
}

/// A column of the table.
struct Setting {
    classes: u32,
    network: &'static str,
    /// Samples over all GPUs.
    batch: u32,
}

const SETTINGS: [Setting; 3] = [
    Setting {
        classes: 2_000_000,
        network: "r100",
        batch: 1024,
    },
    Setting {
        classes: 4_000_000,
        network: "r50",
        batch: 1024,
    },
    Setting {
        classes: 8_000_000,
        network: "r50",
        batch: 512,
    },
];

/// A row of the table: a way of training.
struct Way {
    name: &'static str,
    /// All classes on every GPU, each with its own rows; or a shard of them, with the rows of all.
    whole_head: bool,
    precision: &'static str,
    implementation: &'static str,
    rate: f64,
    /// What InsightFace published for eight V100 of 32 GB (recognition/arcface_torch, README of 2021): samples a second and GB of
    /// each GPU, by setting; none where it ran out of memory.
    published: [Option<(f64, f64)>; 3],
}

const WAYS: [Way; 6] = [
    Way {
        name: "Data Parallel",
        whole_head: true,
        precision: "fp32",
        implementation: "plain",
        rate: 1.0,
        published: [None; 3],
    },
    Way {
        name: "Model Parallel",
        whole_head: false,
        precision: "fp32",
        implementation: "plain",
        rate: 1.0,
        published: [Some((1362.0, 27.3)), Some((1600.0, 30.3)), Some((482.0, 32.1))],
    },
    Way {
        name: "Fp16 + Model Parallel",
        whole_head: false,
        precision: "fp16",
        implementation: "plain",
        rate: 1.0,
        published: [Some((2006.0, 20.3)), Some((2165.0, 26.6)), Some((767.0, 32.1))],
    },
    Way {
        name: "Fp16 + Partial FC 0.1",
        whole_head: false,
        precision: "fp16",
        implementation: "plain",
        rate: 0.1,
        published: [Some((3247.0, 11.9)), Some((4385.0, 10.8)), Some((3001.0, 11.1))],
    },
    Way {
        name: "tiled, rate 1.0",
        whole_head: false,
        precision: "bf16",
        implementation: "tiled",
        rate: 1.0,
        published: [None; 3],
    },
    Way {
        name: "tiled, rate 0.1",
        whole_head: false,
        precision: "bf16",
        implementation: "tiled",
        rate: 0.1,
        published: [None; 3],
    },
];

/// The arguments of `bench step` for one cell.
fn arguments(args: &TableArgs, setting: &Setting, way: &Way, repetitions: u32) -> Vec<String> {
    let scaled = |number: u32| ((f64::from(number) * args.scale) as u32).max(args.world);
    let rows = scaled(setting.batch) / args.world;
    let world = if way.whole_head { 1 } else { args.world };
    let network = if args.tiny { "tiny" } else { setting.network };
    let mut list = vec!["step".to_owned()];
    let mut set = |flag: &str, value: String| list.extend([flag.to_owned(), value]);
    set("--network", network.to_owned());
    set("--classes", scaled(setting.classes).to_string());
    set("--batch", rows.to_string());
    set("--world", world.to_string());
    set("--precision", way.precision.to_owned());
    set("--implementation", way.implementation.to_owned());
    set("--rate", way.rate.to_string());
    set("--repetitions", repetitions.to_string());
    set("--device", args.place.name().to_owned());
    list
}

/// One cell: a process of its own, so that the memory of one is not that of the one before. What ran out of memory says so.
fn cell(args: &TableArgs, setting: &Setting, way: &Way, repetitions: u32) -> Value {
    let list = arguments(args, setting, way, repetitions);
    let command = format!("arcface-worker bench {}", list.join(" "));
    match in_a_process(&list, "default") {
        Ok(step) => {
            let per_gpu = step["samples_per_second"].as_f64().unwrap_or(f64::NAN);
            json!({
                "samples_per_second": per_gpu * f64::from(args.world),
                "samples_per_second_per_gpu": per_gpu,
                "step_ms": step["median_ms"],
                "memory_bytes_per_gpu": step["peak_bytes"],
                "command": command,
            })
        }
        Err(error) => json!({ "error": format!("{error:#}"), "command": command }),
    }
}

/// The whole table as JSON.
pub(super) fn measure(repetitions: u32, args: &TableArgs) -> anyhow::Result<Value> {
    if !(args.scale > 0.0 && args.scale <= 1.0) {
        let message = format!("--scale {} is not in (0, 1]", args.scale);
        return Err(Failure::new(ExitCode::Usage, message).into());
    }
    let settings: Vec<Value> = SETTINGS
        .iter()
        .enumerate()
        .map(|(column, setting)| {
            let ways: Vec<Value> = WAYS
                .iter()
                .map(|way| {
                    eprintln!("{} identities, {}: {}", setting.classes, setting.network, way.name);
                    let mut cell = cell(args, setting, way, repetitions);
                    cell["way"] = way.name.into();
                    cell["published"] = match way.published[column] {
                        Some((speed, gigabytes)) => json!({
                            "samples_per_second": speed, "memory_gb_per_gpu": gigabytes,
                            "on": "8 x V100 32 GB, InsightFace 2021",
                        }),
                        None => Value::Null,
                    };
                    cell
                })
                .collect();
            json!({
                "identities": setting.classes, "network": setting.network, "batch": setting.batch, "ways": ways,
            })
        })
        .collect();
    Ok(json!({
        "bench": "table", "world": args.world, "scale": args.scale,
        "what": format!(
            "the share of one of {} GPUs, run alone: its rows, its shard, the gathered batch; without what GPUs send each other",
            args.world
        ),
        "settings": settings,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: TableArgs,
    }

    #[test]
    fn a_cell_is_the_share_of_one_gpu() {
        let args = Cli::parse_from(["table"]).args;
        let of = |way: &Way| arguments(&args, &SETTINGS[0], way, 5).join(" ");
        assert_eq!(
            of(&WAYS[3]),
            "step --network r100 --classes 2000000 --batch 128 --world 8 --precision fp16 --implementation plain \
             --rate 0.1 --repetitions 5 --device cpu"
        );
        assert!(
            of(&WAYS[0]).contains("--world 1"),
            "every GPU has all classes, and its own rows alone"
        );
        let small = Cli::parse_from(["table", "--scale", "0.001", "--tiny"]).args;
        let list = arguments(&small, &SETTINGS[2], &WAYS[5], 1).join(" ");
        assert!(
            list.contains("--network tiny --classes 8000 --batch 1 --world 8"),
            "{list}"
        );
    }
}
