//! How a kernel is started: by name, with arguments that say what they are. Who starts it is behind [`Launcher`]: a GPU's
//! driver (`crate::device`), or in tests the kernel's twin on the CPU, which holds the arguments against the kernel's own
//! parameters. What the kernels are and how large their memory must be is their owners' business.
//!
//! It needs `unsafe` because a kernel takes its arguments as addresses of anything, and believes them.
#![allow(unsafe_code)]

use std::ffi::c_void;
use tch::Kind;

/// Starts kernels on one device.
pub trait Launcher: Send + Sync {
    /// Starts a kernel after all work that the device was given before, and does not wait for it.
    ///
    /// # Errors
    /// If it does not start. What goes wrong later shows in a later call, of this or of libtorch.
    ///
    /// # Safety
    /// The arguments are the kernel's parameters, in their order. The memory that they point to is this device's, as large
    /// as the kernel takes it for, and is given to nothing but later work of the same stream before the kernel has ended,
    /// which is how libtorch keeps its own.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        arguments: &mut Arguments,
    ) -> Result<(), LaunchError>;

    /// True if the device multiplies bf16 faster than f32.
    fn multiplies_bf16(&self) -> bool;
}

/// The threads of a launch; both have one dimension, and no kernel takes dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks, at least one.
    pub grid: u32,
    /// Threads of a block: a power of two.
    pub block: u32,
}

/// Threads of a block: the most that the kernels are compiled for.
pub const BLOCK: u32 = 256;

/// Neighbouring numbers that one thread reads at once (common.cuh, `GROUP`).
pub const GROUP: i64 = 8;

impl Shape {
    /// A block for each of `count` things.
    pub fn blocks(count: i64) -> Self {
        Self {
            // Kernels stride over what there is beyond.
            grid: u32::try_from(count.clamp(1, i64::from(i32::MAX))).unwrap_or(1),
            block: BLOCK,
        }
    }

    /// A block for each of `count` rows of `dim` numbers: threads that read a group each (common.cuh), and no more, since all of
    /// them meet for every sum.
    pub fn rows(count: i64, dim: i64) -> Self {
        let groups = u32::try_from(dim.max(1) / GROUP).unwrap_or(BLOCK);
        Self {
            block: groups.next_power_of_two().clamp(32, BLOCK),
            ..Self::blocks(count)
        }
    }

    /// A thread for each of `count` things.
    pub fn threads(count: i64) -> Self {
        Self::blocks((count.max(1) - 1) / i64::from(BLOCK) + 1)
    }
}

/// Why a kernel was not started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Memory of another form than the kernel takes: a fault of this program.
    #[error("kernel {kernel}: argument {index} {detail}")]
    Argument {
        /// The kernel.
        kernel: &'static str,
        /// Which argument, from 0.
        index: usize,
        /// What is wrong.
        detail: String,
    },
    /// The device refused it.
    #[error("kernel {kernel} does not start: {reason}")]
    Refused {
        /// The kernel.
        kernel: &'static str,
        /// What the device says.
        reason: String,
    },
}

/// What memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// float.
    F32,
    /// double.
    F64,
    /// 16 bits of a float.
    Bf16,
    /// Byte.
    U8,
    /// 32 bits; libtorch has them with a sign, which our numbers never use.
    U32,
    /// 64 bits with a sign.
    I64,
    /// A struct of numbers of one kind.
    Struct {
        /// As signatures spell it.
        letter: char,
        /// Of its numbers.
        kind: Kind,
        /// How many.
        numbers: i64,
    },
}

impl Element {
    /// The kind of tensors that hold it.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::F64 => Kind::Double,
            Self::Bf16 => Kind::BFloat16,
            Self::U8 => Kind::Uint8,
            Self::U32 => Kind::Int,
            Self::I64 => Kind::Int64,
            Self::Struct { kind, .. } => kind,
        }
    }

    /// Numbers of a tensor that make one.
    pub fn numbers(self) -> i64 {
        match self {
            Self::Struct { numbers, .. } => numbers,
            _ => 1,
        }
    }

    /// Of floating-point numbers of this kind.
    pub fn of_float(kind: Kind) -> Self {
        match kind {
            Kind::BFloat16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    fn letter(self) -> char {
        match self {
            Self::F32 => 'f',
            Self::F64 => 'd',
            Self::Bf16 => 'h',
            Self::U8 => 'b',
            Self::U32 => 'u',
            Self::I64 => 'l',
            Self::Struct { letter, .. } => letter,
        }
    }
}

/// What an argument is. Spelled as twin/launch.cpp spells the parameters of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Pointer { element: Element, written: bool },
    Value(char),
}

/// A type that kernels take by value.
pub trait Value: Copy {
    /// As signatures spell it.
    const LETTER: char;
}

macro_rules! values {
    ($($type:ty: $letter:literal;)*) => {
        $(impl Value for $type {
            const LETTER: char = $letter;
        })*
    };
}
values! {
    f32: 'f';
    f64: 'd';
    i32: 'i';
    u32: 'u';
    i64: 'l';
    u64: 'U';
}

/// Bytes of the largest parameter.
const LARGEST: usize = 32;
/// Most parameters of a kernel.
const MOST: usize = 16;

/// A parameter's bytes, aligned as all of them want it.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Slot([u8; LARGEST]);

/// The arguments of one launch, in the order of the kernel's parameters.
pub struct Arguments {
    slots: [Slot; MOST],
    types: Vec<Type>,
}

impl Arguments {
    /// None yet.
    pub fn new() -> Self {
        Self {
            slots: [Slot([0; LARGEST]); MOST],
            types: Vec::with_capacity(MOST),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.types.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.types.is_empty()
    }

    /// Adds the address of memory that the kernel reads, or writes.
    pub fn pointer(&mut self, element: Element, written: bool, address: *mut c_void) {
        self.push(Type::Pointer { element, written }, address);
    }

    /// Adds a value.
    pub fn value<T: Value>(&mut self, value: T) {
        self.push(Type::Value(T::LETTER), value);
    }

    fn push<T: Copy>(&mut self, kind: Type, value: T) {
        const { assert!(size_of::<T>() <= LARGEST && align_of::<T>() <= align_of::<Slot>()) };
        let slot = &raw mut self.slots[self.types.len()];
        // SAFETY: the slot is a place of its own, as large and as aligned as the value wants it.
        unsafe { slot.cast::<T>().write(value) };
        self.types.push(kind);
    }

    /// Where each argument stands, as launches take them; beyond the last one null. Good for as long as nobody changes this.
    pub fn pointers(&mut self) -> [*mut c_void; MOST] {
        let mut pointers = [std::ptr::null_mut(); MOST];
        for (pointer, slot) in pointers.iter_mut().zip(&mut self.slots).take(self.types.len()) {
            *pointer = (&raw mut *slot).cast();
        }
        pointers
    }

    /// The types of all of them in short: `<f` is a pointer to floats that are read, `>f` to such that are written, `l` a
    /// number of 64 bits.
    pub fn signature(&self) -> String {
        let mut text = String::new();
        for kind in &self.types {
            match kind {
                Type::Pointer { element, written } => {
                    text.push(if *written { '>' } else { '<' });
                    text.push(element.letter());
                }
                Type::Value(letter) => text.push(*letter),
            }
        }
        text
    }
}

impl Default for Arguments {
    fn default() -> Self {
        Self::new()
    }
}
