"""Reference interpreter for Core ML programs: evaluates a .mlpackage with torch on the CPU, on any system."""
