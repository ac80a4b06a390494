//! Recording and launching CUDA graphs, with a stand-in for libtorch's CUDA half that says what is asked of it. What a GPU makes of
//! it, `tests/gpu/accept.sh` shows.
//!
//! It needs `unsafe` to call the stand-in.
#![allow(unsafe_code)]

mod cuda_stubs;

use arcface_worker::device::{CudaGraph, Recorder};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, CString, c_char};

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

    fn fail(&self, fails: bool) {
        // SAFETY: the type is that of the source.
        unsafe {
            let set = self.0.get::<unsafe extern "C" fn(bool)>("stand_in_fails");
            set.expect("it is there")(fails);
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

    // What cannot be recorded is said, and work goes on where it was. libtorch still knows the graph: it is not freed.
    stand_in.fail(true);
    let looked = recorder.record(|| stand_in.say("a look"));
    let error = looked.err().expect("it fails").to_string();
    assert_eq!(
        error,
        "CUDA graph: operation not permitted when stream is capturing"
    );
    stand_in.fail(false);
    let panicked = recorder.record(|| panic!("{}\nand where", "no memory"));
    assert_eq!(
        panicked.err().expect("it fails").to_string(),
        "CUDA graph: no memory"
    );
    stand_in.say("head");
    let said = stand_in.said();
    assert_eq!(said.last().map(String::as_str), Some("head on 0"));
    assert!(!said.iter().any(|line| line.contains("freed")), "{said:?}");

    drop((recorder, there, back));
    assert_eq!(stand_in.said(), ["graph 1 freed on 0", "graph 2 freed on 0"]);
}
