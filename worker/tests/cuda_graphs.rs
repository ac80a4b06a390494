//! Recording and launching CUDA graphs, with a stand-in for libtorch's CUDA half that says what is asked of it. What a GPU makes of
//! it, `tests/gpu/accept.sh` shows.
//!
//! It needs `unsafe` to call the stand-in.
#![allow(unsafe_code)]

mod cuda_stubs;

use arcface_proto::spec::Precision;
use arcface_worker::{
    device::{CudaGraph, CudaGraphError, Recorder},
    model::{Backbone, BackboneConfig, DropoutDraw, ForwardMode, let_go_of_gradient},
    rank::captured::Captured,
};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, CString, c_char};
use tch::{Device, Kind, Tensor};

struct StandIn(Library);

impl StandIn {
    fn load(folder: &std::path::Path) -> Self {
        cuda_stubs::compile_for_libtorch("graphs.cpp", folder, "graphs.so");
        // SAFETY: runs its initialisers, which register what it stands in for.
        let library = unsafe { Library::open(Some(folder.join("graphs.so")), RTLD_NOW | RTLD_GLOBAL) };
        Self(library.expect("it loads"))
    }

    fn said(&self) -> Vec<String> {
        // SAFETY: the type is that of the source; the text lives until the next call.
        let text = unsafe {
            let said = self
                .0
                .get::<unsafe extern "C" fn() -> *const c_char>("stand_in_said");
            CStr::from_ptr(said.expect("it is there")())
        };
        text.to_string_lossy().lines().map(str::to_owned).collect()
    }

    fn say(&self, what: &str) {
        let what = CString::new(what).expect("no zero");
        // SAFETY: the type is that of the source.
        unsafe {
            let say = self.0.get::<unsafe extern "C" fn(*const c_char)>("stand_in_says");
            say.expect("it is there")(what.as_ptr());
        }
    }

    /// Whether ends of recordings fail from now on, and giving graphs back.
    fn fail(&self, end: bool, reset: bool) {
        // SAFETY: the type is that of the source.
        unsafe {
            let set = self.0.get::<unsafe extern "C" fn(bool, bool)>("stand_in_fails");
            set.expect("it is there")(end, reset);
        }
    }
}

/// One process has one stand-in, so this is one test.
#[test]
fn graphs_are_recorded_beside_and_launched_where_work_goes_on() {
    if cuda_stubs::machine_has_the_real_ones() {
        println!("SKIPPED: a stand-in would be in the way of this machine's GPU");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let stand_in = StandIn::load(folder.path());
    graphs(&stand_in);
    for (checkpointing, borders, expected) in [
        (false, vec![], vec![0]),
        (false, vec![1, 3], vec![3, 1, 0]),
        (true, vec![], (0..PARTS).rev().collect()),
    ] {
        passes(&stand_in, checkpointing, &borders, &expected);
    }
}

fn graphs(stand_in: &StandIn) {
    let mut recorder = Recorder::new(0).expect("there are graphs");
    assert_eq!(stand_in.said(), ["wait", "give back"]);

    let record = |recorder: &mut Recorder, what: &str| -> CudaGraph {
        let (graph, made) = recorder.record(|| (stand_in.say(what), 5).1).expect("recorded");
        assert_eq!(made, 5);
        graph
    };
    let there = record(&mut recorder, "way there");
    let back = record(&mut recorder, "way back");
    // The second works in the first one's memory.
    let expected = [
        "graph 1 on 7",
        "graph 1 begins in pool 0,0 mode 1 on 7",
        "way there on 7",
        "graph 1 ends on 7",
        "graph 2 on 7",
        "graph 2 begins in pool 41,42 mode 1 on 7",
        "way back on 7",
        "graph 2 ends on 7",
    ];
    assert_eq!(stand_in.said(), expected);

    stand_in.say("head");
    there.launch().expect("it runs");
    back.launch().expect("it runs");
    assert_eq!(
        stand_in.said(),
        ["head on 0", "graph 1 runs on 0", "graph 2 runs on 0"]
    );

    // What the driver breaks off is said, and work goes on where it was. libtorch's allocator still asks that graph: it is not freed.
    stand_in.fail(true, false);
    let looked = recorder.record(|| stand_in.say("a look"));
    let error = looked.err().expect("it fails");
    assert_eq!(
        error.to_string(),
        "CUDA graph: the recording was broken off: operation not permitted when stream is capturing"
    );
    stand_in.fail(false, false);
    assert_eq!(
        stand_in.said().last().map(String::as_str),
        Some("graph 3 ends on 7")
    );
    // What panics has ended all the same, and gives back what it took.
    let panicked = recorder.record(|| panic!("{}\nand where", "no memory"));
    let error = panicked.err().expect("it fails");
    assert_eq!(error, CudaGraphError::Refused("no memory".to_owned()));
    assert_eq!(
        stand_in.said().last().map(String::as_str),
        Some("graph 4 freed on 0")
    );

    drop((recorder, there));
    assert_eq!(stand_in.said(), ["graph 1 freed on 0"]);
    // A GPU that answers nothing any more ends no process.
    stand_in.fail(false, true);
    drop(back);
    stand_in.fail(false, false);
    assert_eq!(stand_in.said(), [""; 0]);
}

/// Parts of `tiny`.
const PARTS: usize = 6;

/// A network's pass as graphs. The stand-in's GPU is the CPU: what is recorded is also done, with a gradient of zeros.
fn passes(stand_in: &StandIn, gradient_checkpointing: bool, borders: &[usize], expected: &[usize]) {
    let config = BackboneConfig {
        gradient_checkpointing,
        ..BackboneConfig::new("tiny", 16)
    };
    let mut backbone = Backbone::new(&config).expect("known");
    backbone.fill_golden();
    let part_of = backbone.parts();
    assert_eq!(part_of.iter().max(), Some(&(PARTS - 1)));
    let trainable = backbone.trainable().into_iter();
    let mut params: Vec<Tensor> = trainable.map(|(_, tensor)| tensor.shallow_clone()).collect();
    let mode = ForwardMode::training(Precision::Fp32, DropoutDraw::default());
    let images = Tensor::rand([2, 3, 112, 112], (Kind::Float, Device::Cpu));
    let mut captured = Captured::record(&backbone, &params, &images, &mode, borders, 0).expect("recorded");
    params.iter_mut().for_each(let_go_of_gradient);
    let recorded = stand_in.said();
    let ended = recorded.iter().filter_map(|line| line.strip_suffix(" ends on 7"));
    let runs: Vec<String> = ended.map(|graph| format!("{graph} runs on 0")).collect();
    assert_eq!(
        runs.len(),
        1 + expected.len(),
        "the way there, and the pieces of the way back"
    );

    let embedding = captured.forward(&images).expect("it runs");
    assert_eq!(embedding.size(), [2, 16]);
    let grad = embedding.ones_like();
    let mut addresses = Vec::new();
    for alone in [true, true, false] {
        let mut heard = Vec::new();
        captured
            .backward_by_part(&grad, &mut params, alone, |part, params| {
                heard.push(part);
                for (param, of) in params.iter().zip(&part_of) {
                    assert_eq!(
                        param.grad().defined(),
                        *of >= part,
                        "part {of} once {part} is complete"
                    );
                }
                Ok(())
            })
            .expect("it runs");
        assert_eq!(heard, expected);
        addresses.push(params[0].grad().data_ptr());
        params.iter_mut().for_each(let_go_of_gradient);
    }
    assert_eq!(addresses[0], addresses[1], "where it was recorded");
    assert_ne!(addresses[1], addresses[2], "others are added to a copy");
    let back = &runs[1..];
    let expected = [&runs[..], back, back].concat();
    assert_eq!(
        stand_in.said(),
        expected,
        "in the order in which they were recorded"
    );
    drop(captured);
    assert_eq!(stand_in.said().len(), runs.len(), "all are freed");
}
