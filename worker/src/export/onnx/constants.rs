//! The weights of a graph, computed when somebody asks for them: large networks do not fit into memory twice.

use tch::{Kind, Tensor};

use super::{fold::Affine, proto::DataType};

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

/// How to compute a layer's weight, each row multiplied by what follows the layer.
pub fn rows(weight: &Tensor, then: Option<&Affine>) -> impl Fn() -> Tensor + 'static {
    let weight = weight.shallow_clone();
    let scale = then.map(|then| {
        let mut shape = vec![1; weight.dim()];
        shape[0] = -1;
        then.scale.view(shape.as_slice())
    });
    move || match &scale {
        None => weight.shallow_clone(),
        Some(scale) => (weight.to_kind(Kind::Double) * scale).to_kind(Kind::Float),
    }
}

/// A layer's bias after what follows the layer, if either is there.
pub fn bias(bias: Option<&Tensor>, then: Option<&Affine>) -> Option<Tensor> {
    let wide = |bias: &Tensor| bias.detach().to_kind(Kind::Double);
    match (bias, then) {
        (None, None) => None,
        (Some(bias), None) => Some(bias.shallow_clone()),
        (None, Some(then)) => Some(then.shift.to_kind(Kind::Float)),
        (Some(bias), Some(then)) => Some((wide(bias) * &then.scale + &then.shift).to_kind(Kind::Float)),
    }
}
