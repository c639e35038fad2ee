"""f_theta: an image pair and query points in, correspondences out."""
