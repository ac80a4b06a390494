//! Which images of a class are its own, by the centres that training found for it: section 3.2 of "Sub-center ArcFace"
//! (Deng et al., ECCV 2020). Pure: cosines in, angles out.

/// Cosines of images with the centres of their own classes.
#[derive(Debug)]
pub struct Cosines {
    /// Centres a class.
    centers: usize,
    /// Class of each image.
    labels: Vec<u32>,
    /// Image by image, one cosine a centre.
    values: Vec<f32>,
}

impl Cosines {
    /// None yet.
    pub fn new(centers: usize) -> Self {
        Self {
            centers: centers.max(1),
            labels: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Adds images: their classes, and their cosines in the same order.
    ///
    /// # Panics
    /// If there are not as many cosines as images times centres.
    pub fn extend(&mut self, labels: &[u32], values: &[f32]) {
        assert_eq!(
            labels.len() * self.centers,
            values.len(),
            "one cosine a centre and image"
        );
        self.labels.extend_from_slice(labels);
        self.values.extend_from_slice(values);
    }

    /// The centre of each class that most of its images are nearest to, the first of equals: clean images agree, and
    /// gather around one. 0 for a class without images.
    fn dominant(&self) -> Vec<usize> {
        let classes = self.labels.iter().map(|&label| label as usize + 1).max();
        let mut counts = vec![0u64; classes.unwrap_or(0) * self.centers];
        for (&label, cosines) in self.labels.iter().zip(self.values.chunks(self.centers)) {
            counts[label as usize * self.centers + first_largest(cosines)] += 1;
        }
        counts.chunks(self.centers).map(first_largest).collect()
    }

    /// Angle of each image to its class's dominant centre, in degrees.
    pub fn angles(&self) -> Vec<f64> {
        let dominant = self.dominant();
        let images = self.labels.iter().zip(self.values.chunks(self.centers));
        images
            .map(|(&label, cosines)| {
                let cos = f64::from(cosines[dominant[label as usize]]);
                cos.clamp(-1.0, 1.0).acos().to_degrees()
            })
            .collect()
    }
}

fn first_largest<T: PartialOrd>(values: &[T]) -> usize {
    let mut best = 0;
    for (place, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = place;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_measured_from_the_centre_that_most_are_near() {
        let mut cosines = Cosines::new(2);
        // Class 1: two images at centre 1, one at centre 0, which is far from centre 1.
        cosines.extend(&[1, 1], &[0.1, 1.0, 0.2, 0.5]);
        cosines.extend(&[1], &[0.9, 0.0]);
        // Class 3, one image; classes 0 and 2 have none.
        cosines.extend(&[3], &[1.0, 0.3]);
        assert_eq!(cosines.dominant(), [0, 1, 0, 0]);
        let angles: Vec<i64> = cosines
            .angles()
            .iter()
            .map(|angle| angle.round() as i64)
            .collect();
        assert_eq!(angles, [0, 60, 90, 0]);
    }

    #[test]
    fn one_centre_a_class_is_the_dominant_one() {
        let mut cosines = Cosines::new(1);
        cosines.extend(&[0, 0], &[0.0, 1.000_001]);
        assert_eq!(cosines.angles(), [90.0, 0.0]);
    }

    #[test]
    fn no_images_have_no_angles() {
        assert!(Cosines::new(3).angles().is_empty());
    }
}
