"""Choose constants by what the network does best with them, on images that they were not measured on."""
