//! The reference's losses, gradients, weights and optimizer state (`golden/pfc`), as `worker/tests/golden_pfc.rs` has it for
//! the other heads; every rank is a thread.

#[path = "../../../../tests/golden/mod.rs"]
mod files;

use super::head::head;
use crate::kernels::{
    launch::{Arguments, LaunchError, Launcher, Shape},
    twin::launcher::TwinLauncher,
};
use crate::{
    collective::Collective,
    head::{
        Head, HeadConfig,
        cuda::CudaHead,
        suite::{self, on_ranks},
    },
    optim::OptimizerConfig,
};
use files::GoldenFile;
use serde_json::Value;
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};

/// As in `golden_pfc.rs`.
const TOLERANCE: f64 = 1e-5;
const ADAMW_WEIGHT_TOLERANCE: f64 = 4e-3;
const ADAMW_GRADIENT_TOLERANCE: f64 = 1e-4;

/// Marks the classes that the reference drew as if samples had them; they are as many as are wanted, so no others come.
struct Injecting {
    twin: TwinLauncher,
    classes: Mutex<Vec<usize>>,
}

impl Launcher for Injecting {
    #[allow(unsafe_code)]
    unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        arguments: &mut Arguments,
    ) -> Result<(), LaunchError> {
        // SAFETY: the caller's word.
        unsafe { self.twin.launch(kernel, shape, arguments)? };
        if kernel == "head_mark_positives" {
            // SAFETY: the third argument is a pointer to a flag a class; the twin has just used it.
            let flags = unsafe { arguments.pointers()[2].cast::<*mut u8>().read() };
            for &class in self.classes.lock().expect("nobody panics with it").iter() {
                // SAFETY: as above; the classes are those of the shard.
                unsafe { flags.add(class).write(1) };
            }
        }
        Ok(())
    }

    fn multiplies_bf16(&self) -> bool {
        false
    }
}

#[test]
fn sharded_training_equals_the_reference() {
    let paths = files::golden_files("pfc", "pfc_", ".safetensors");
    for path in &paths {
        let world_size = number(&files::read_safetensors(path).meta("world_size")) as usize;
        on_ranks(world_size, |comm| {
            let file = files::read_safetensors(path);
            train_with_sgd(&file, comm);
            train_with_adamw(&file, comm);
        });
    }
    files::report("pfc on the kernels' twins", paths.len());
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// The head of a file on one rank, with the file's weights and draws.
struct Run<'a> {
    file: &'a GoldenFile,
    rank: u32,
    head: CudaHead,
    launcher: Arc<Injecting>,
}

impl<'a> Run<'a> {
    fn new(file: &'a GoldenFile, comm: &dyn Collective, optimizer: OptimizerConfig) -> Self {
        let margin = file.meta("margin");
        let config = HeadConfig {
            margin: [0, 1, 2].map(|i| number(&margin[i])),
            scale: number(&file.meta("s")),
            interclass_filtering_threshold: Some(number(&file.meta("filter")))
                .filter(|&threshold| threshold > 0.0),
            sample_rate: number(&file.meta("sample_rate")),
            optimizer,
            ..suite::config(
                number(&file.meta("num_classes")) as u32,
                number(&file.meta("embedding")) as i64,
            )
        };
        let launcher = Arc::new(Injecting {
            twin: TwinLauncher::new(4),
            classes: Mutex::default(),
        });
        let place = (comm.rank(), comm.world_size());
        let head = head(&config, place, Kind::Float, launcher.clone());
        let mut run = Self {
            file,
            rank: comm.rank(),
            head,
            launcher,
        };
        let weight = run.rows_of(&file.tensor("init_weight"));
        let mut start = |name: &str| {
            Some(match name {
                "weight" => weight.copy(),
                _ => weight.zeros_like(),
            })
        };
        run.head.load_state(0, &mut start).expect("the file's weights");
        run
    }

    /// This shard's rows of a tensor of all classes.
    fn rows_of(&self, all: &Tensor) -> Tensor {
        let shard = self.head.shard();
        all.narrow(0, i64::from(shard.lo), i64::from(shard.len()))
    }

    fn step(&mut self, comm: &mut dyn Collective, step: u64, prefix: &str, lr: f64) {
        if let Some(index) = self.file.get(&format!("index.s{step}.r{}", self.rank)) {
            let classes = files::values(&index).into_iter().map(|class| class as usize);
            *self.launcher.classes.lock().expect("nobody panics with it") = classes.collect();
        }
        let own = |name: String| self.file.tensor(&name).select(0, i64::from(self.rank));
        let (embedding, labels) = (own(format!("emb.s{step}")), own(format!("labels.s{step}")));
        let rows = vec![labels.numel() as u32; comm.world_size() as usize];
        let out = self
            .head
            .forward_backward(comm, &embedding, &labels, &rows, step, 1.0)
            .expect("a good batch");
        if let Some(index) = self.file.get(&format!("index.s{step}.r{}", self.rank)) {
            assert_eq!(out.seen.sampled_rows as usize, index.numel());
        }
        if let Some(loss) = self.file.get(&format!("{prefix}.loss")) {
            let ours = Tensor::from_slice(&[out.loss]);
            self.check(&format!("{prefix}.loss"), &ours, &loss, TOLERANCE);
        }
        if let Some(golden) = self.file.get(&format!("{prefix}.grad_emb")) {
            let tolerance = match prefix.starts_with("adamw") {
                true => ADAMW_GRADIENT_TOLERANCE,
                false => TOLERANCE,
            };
            let golden = golden.select(0, i64::from(self.rank));
            self.check(
                &format!("{prefix}.grad_emb"),
                &out.grad_embedding,
                &golden,
                tolerance,
            );
        }
        self.head.update(lr);
    }

    fn check_state(&mut self, optimizer: &str, weight_tolerance: f64, buffer_tolerance: f64) {
        for (name, ours) in self.head.state() {
            let in_file = format!("{optimizer}.{name}");
            let golden = self.rows_of(&self.file.tensor(&in_file));
            let tolerance = match name.as_str() {
                "weight" => weight_tolerance,
                _ => buffer_tolerance,
            };
            self.check(&in_file, &ours, &golden, tolerance);
        }
    }

    fn check(&self, what: &str, ours: &Tensor, golden: &Tensor, tolerance: f64) {
        let distance = files::relative_l2(ours, golden);
        let file = self.file.path.display();
        assert!(
            distance <= tolerance,
            "{file} rank {}: {what} differs by {distance:e}",
            self.rank
        );
    }
}

fn train_with_sgd(file: &GoldenFile, comm: &mut dyn Collective) {
    let sgd = file.meta("sgd");
    let optimizer = OptimizerConfig::Sgd {
        momentum: number(&sgd["momentum"]),
        weight_decay: number(&sgd["weight_decay"]),
    };
    let mut run = Run::new(file, comm, optimizer);
    for step in 0..number(&sgd["steps"]) as u64 {
        run.step(comm, step, &format!("sgd.s{step}"), number(&sgd["lr"]));
    }
    run.check_state("sgd", TOLERANCE, TOLERANCE);
}

fn train_with_adamw(file: &GoldenFile, comm: &mut dyn Collective) {
    let adamw = file.meta("adamw");
    let optimizer = OptimizerConfig::AdamW {
        weight_decay: number(&adamw["weight_decay"]),
        beta1: number(&adamw["betas"][0]),
        beta2: number(&adamw["betas"][1]),
        eps: number(&adamw["eps"]),
    };
    let mut run = Run::new(file, comm, optimizer);
    for step in 0..number(&adamw["steps"]) as u64 {
        run.step(comm, step, &format!("adamw.s{step}"), number(&adamw["lr"]));
    }
    run.check_state("adamw", ADAMW_WEIGHT_TOLERANCE, ADAMW_GRADIENT_TOLERANCE);
}
