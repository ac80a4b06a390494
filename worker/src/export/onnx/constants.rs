//! The weights of a graph, computed when somebody asks for them: large networks do not fit into memory twice.

use tch::Tensor;

use super::proto::DataType;

/// A constant of the graph.
pub struct Initializer {
    /// Name of the value.
    pub name: String,
    /// Shape.
    pub dims: Vec<i64>,
    /// Kind of the elements.
    pub data_type: DataType,
    value: Box<dyn Fn() -> Tensor>,
}

impl Initializer {
    /// f32 elements in any form that has as many as `dims`.
    pub fn new(name: String, dims: &[i64], value: impl Fn() -> Tensor + 'static) -> Self {
        Self {
            name,
            dims: dims.to_vec(),
            data_type: DataType::Float,
            value: Box::new(value),
        }
    }

    /// A list of integers: a shape.
    pub fn ints(name: String, values: Vec<i64>) -> Self {
        Self {
            name,
            dims: vec![values.len() as i64],
            data_type: DataType::Int64,
            value: Box::new(move || Tensor::from_slice(&values)),
        }
    }

    /// Computes the values; their order in memory is that of `dims`.
    pub fn value(&self) -> Tensor {
        tch::no_grad(|| (self.value)())
    }

    /// Length of the values in bytes.
    pub fn num_bytes(&self) -> u64 {
        let size = match self.data_type {
            DataType::Int64 => 8,
            DataType::Float | DataType::Undefined => 4,
        };
        self.dims.iter().product::<i64>() as u64 * size
    }
}
