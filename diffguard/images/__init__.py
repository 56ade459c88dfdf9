"""Images from files to tensors: decoding, searching folders, and the one format that a detector takes."""

from diffguard.images.decoding import decoded as decoded
from diffguard.images.decoding import picture_of as picture_of
from diffguard.images.decoding import read_picture as read_picture
from diffguard.images.decoding import upright as upright
from diffguard.images.folders import Walk as Walk
from diffguard.images.folders import image_suffixes as image_suffixes
from diffguard.images.folders import is_hidden as is_hidden
from diffguard.images.folders import is_image as is_image
from diffguard.images.folders import walk as walk
from diffguard.images.format import brought_into_shape as brought_into_shape
from diffguard.images.format import read_image as read_image
from diffguard.images.format import to_format as to_format
from diffguard.images.format import to_picture as to_picture
from diffguard.images.format import to_tensor as to_tensor
