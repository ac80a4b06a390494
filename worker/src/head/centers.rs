//! Several centres a class: sub-centre ArcFace (Deng, Guo, Liu, Gong, Zafeiriou: "Sub-center ArcFace: Boosting Face
//! Recognition by Large-scale Noisy Web Faces", ECCV 2020; L_7 in the journal version of ArcFace,
//! arXiv:1801.07698v4). Section 3.2: a class has K rows of weight and its angle is theta_j = arccos(max over k of
//! W_jk . x), for the row's own class and for all others alike; the margin follows as
//! ever. A noisy image can then have a centre of its own and leaves the class's main one in peace.
//!
//! Shapes: b rows, c classes, k centres a class.

use tch::Tensor;

/// The nearest centre of each class.
pub(super) struct Nearest {
    /// `[b, c]`: cosine with it.
    pub(super) cos_bc: Tensor,
    /// `[b, c, 1]` i64: which one; `None` where classes have one centre.
    index_bc1: Option<Tensor>,
}

impl Nearest {
    /// Of cosines `[b, c*k]`, the centres of a class side by side. The first of equals counts.
    pub(super) fn of(cos: Tensor, centers: i64) -> Self {
        if centers == 1 {
            return Self {
                cos_bc: cos,
                index_bc1: None,
            };
        }
        let rows = cos.size()[0];
        let columns = cos.size()[1] / centers;
        let (cos_bc1, index_bc1) = cos.view([rows, columns, centers]).max_dim(2, true);
        Self {
            cos_bc: cos_bc1.squeeze_dim(2),
            index_bc1: Some(index_bc1),
        }
    }

    /// The gradient `[b, c*k]` of all centres from that of the nearest `[b, c]`: the others get none.
    pub(super) fn backward(&self, grad_bc: Tensor, centers: i64) -> Tensor {
        let Some(index_bc1) = &self.index_bc1 else {
            return grad_bc;
        };
        let (rows, columns) = (grad_bc.size()[0], grad_bc.size()[1]);
        let grad_bck = Tensor::zeros([rows, columns, centers], (grad_bc.kind(), grad_bc.device()));
        grad_bck
            .scatter(2, index_bc1, &grad_bc.unsqueeze(2))
            .view([rows, columns * centers])
    }
}
